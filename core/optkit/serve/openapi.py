"""What `/openapi.json` says beyond what FastAPI knows: errors have one shape, and how uploads look."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

__all__ = ["document"]

_NULLABLE = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE,
                "code": _NULLABLE,
            },
        }
    },
}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
}


def document(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """The OpenAPI document of an application, made once.

    Args:
        app: whose endpoints.
        keys: whether they need one.
    """
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        made.setdefault("components", {}).setdefault("schemas", {})["Error"] = _ERROR
        for path in made["paths"].values():
            for operation in path.values():
                responses = operation["responses"]
                # FastAPI's own answer to an invalid body, which here is 400 like every other fault of a request.
                responses.pop("422", None)
                for status, description in (("4XX", "The request is wrong, or too much"), ("5XX", "The server failed")):
                    responses[status] = {
                        "description": description,
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                    }
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        if keys:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"key": []}]
        upload = {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}
        made["paths"]["/v1/files"]["post"]["requestBody"] = upload
        app.openapi_schema = made
    return app.openapi_schema
