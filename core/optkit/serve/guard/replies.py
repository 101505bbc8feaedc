"""Errors as ASGI messages, for everything that answers before the application does."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from optkit.serve.errors import ApiError

__all__ = ["reply", "send_error"]


def reply(error: ApiError) -> JSONResponse:
    """The answer that `error` is."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with `error`."""
    await reply(error)(scope, receive, send)
