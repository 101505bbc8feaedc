"""Errors as OpenAI's clients read them: a fixed text, a type, and a request id in the header. Never a repr or a path.

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Mapping

from optkit.engine.openai import error_body
from optkit.errors import RequestError

__all__ = ["DIED", "ApiError", "Refused", "internal", "of_request", "unavailable"]

DIED = "worker_died"
"""`code` of a `Refused` that says that the model's process died over the request, or over one beside it."""
INVALID = "invalid_request_error"


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the client; nothing of the server's inside.
        kind: OpenAI's `type`.
        param: the field that is wrong.
        code: OpenAI's `code`, which programs read.
        headers: that go with it, for example `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """As JSON."""
        return error_body(self.message, kind=self.kind, param=self.param, code=self.code)


class Refused(ApiError):
    """A request that is turned away before any work; another time it may be taken."""


def of_request(error: RequestError) -> ApiError:
    """What is wrong with a request, without what was found in it."""
    message = error.what if not error.remedy else f"{error.what}; {error.remedy}"
    return ApiError(400, message)


def internal() -> ApiError:
    """For everything that is not the client's fault. The log says more, under the request's id."""
    return ApiError(500, "the server failed; its log says more under this request's id", kind="server_error")


def unavailable(message: str, code: str = "unavailable") -> Refused:
    """503: nothing is wrong with the request, and another time it may be served."""
    return Refused(503, message, kind="server_error", code=code, headers={"retry-after": "5"})
