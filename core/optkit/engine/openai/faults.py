"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from optkit.errors import OptkitError

__all__ = ["error_body", "fault", "fault_of", "invalid"]

_REFUSED = {
    "audio": "this model takes and gives text only",
    "chat_template": "the template comes with the model and cannot be replaced",
    "function_call": "not supported; use tool_choice",
    "functions": "not supported; use tools",
    "reasoning_effort": "not supported",
    "suffix": "not supported; this engine only continues text",
    "web_search_options": "not supported; this server reaches nothing but its model",
}
"""Fields of OpenAI's that have a reason of their own."""
_MEMBERS = ("str", "constrained-str", "NamedTool")
"""What pydantic calls the members of unions, beside those with brackets."""


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(error: ValidationError | OptkitError) -> dict[str, Any]:
    """The error body for a request that is wrong."""
    if isinstance(error, ValidationError):
        message, param = fault(error)
        return error_body(message, param=param)
    return error_body(str(error))


def fault(error: ValidationError) -> tuple[str, str | None]:
    """A fault in words, and where it is. Nothing of the request is repeated."""
    return fault_of(error.errors(include_url=False, include_input=False))


def fault_of(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The same from what pydantic lists."""
    # Of the members of a union, the one of the right type and that got furthest is what was meant.
    first = max(errors, key=lambda one: (not one["type"].endswith("_type"), len(one["loc"])))
    parts = [str(part) for part in first["loc"] if part not in _MEMBERS and "[" not in str(part)]
    where = ".".join(parts)[:200] or None
    if first["type"] == "extra_forbidden":
        message = _REFUSED.get(parts[-1], "unknown field")
    elif first["type"] == "string_unicode":
        message = "holds half of a surrogate pair, which is no character"
    else:
        message = first["msg"].removeprefix("Value error, ")
    return (f"{where}: {message}" if where else message), where
