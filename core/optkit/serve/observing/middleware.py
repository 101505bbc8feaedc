"""Where every request begins and ends: its id, its line in the log, its span, and the answer when all else failed."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optkit.serve.errors import internal
from optkit.serve.observing.metrics import Metrics
from optkit.serve.observing.record import QUIET, UNKNOWN, Aborted, Record
from optkit.serve.observing.tracing import Tracing

__all__ = ["Observed"]

_log = logging.getLogger(__name__)

_CLIENT_GONE = 499
"""nginx' status for a client that left before it had its answer."""
_LONGEST = 512
"""Characters of a client's own id, as OpenAI allows."""


class Observed:
    """Notes every HTTP request, from outside all other middleware.

    An exception that nobody handled becomes a 500, or ends the connection when the answer has begun; either way it is
    logged once, with the request's id.

    Args:
        app: what answers. Middleware in it hands on the same scope, or the route stays unknown.
        metrics: count the answers.
        tracer: makes spans.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracing | None = None) -> None:
        self._app, self._metrics, self._tracer = app, metrics, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of one connection; whatever is not HTTP passes.

        Raises:
            Aborted: the answer broke off. The server ends the connection.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(
            f"req_{secrets.token_hex(12)}", scope["method"], client_request_id=_client_request_id(scope["headers"])
        )
        scope.setdefault("state", {})["record"] = record
        answer = _Answer(record, receive, send)
        traced = self._tracer is not None and scope["path"] not in QUIET
        span = self._tracer.begin(record, scope["headers"]) if self._tracer is not None and traced else None
        try:
            await self._app(scope, answer.receive, answer.send)
            if not answer.started and not answer.gone:
                raise RuntimeError("the application gave no answer")
        except asyncio.CancelledError:
            record.error = record.error or "cancelled"
            answer.gone = answer.gone or not answer.ended
            raise
        except Exception as error:
            record.error = record.error or type(error).__name__
            # Whoever reads from a client that left is told so by an exception.
            if not answer.gone:
                await self._failed(record, answer, error)
        finally:
            record.path = _template(scope)
            if answer.gone:
                record.status = _CLIENT_GONE
            self._end(record)
            if span is not None and self._tracer is not None:
                self._tracer.end(span, record)

    async def _failed(self, record: Record, answer: _Answer, error: Exception) -> None:
        _log.error("request failed", exc_info=error, extra={"request_id": record.request_id})
        if not answer.started:
            body = json.dumps(internal().body()).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await answer.send({"type": "http.response.start", "status": internal().status, "headers": headers})
            await answer.send({"type": "http.response.body", "body": body})
        elif not answer.ended:
            record.status = internal().status
            raise Aborted(record.request_id) from None

    def _end(self, record: Record) -> None:
        seconds = time.monotonic() - record.started
        self._metrics.responded(record.path, record.method, record.status, seconds)
        level = logging.ERROR if record.status >= 500 else logging.DEBUG if record.path in QUIET else logging.INFO
        facts = {
            "request_id": record.request_id,
            "client_request_id": record.client_request_id,
            "method": record.method,
            "path": record.path,
            "status": record.status,
            "seconds": round(seconds, 6),
            "model": record.model,
            "tenant": record.tenant,
            "stream": record.stream,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "output_tokens": record.output_tokens,
            "finish_reasons": record.finish_reasons,
            "ttft": None if record.ttft is None else round(record.ttft, 6),
            "error": record.error,
        }
        _log.log(level, "request", extra=facts)


class _Answer:
    """How far the answer to one request has come."""

    def __init__(self, record: Record, receive: Receive, send: Send) -> None:
        self._record, self._receive, self._send = record, receive, send
        self.started = self.ended = self.gone = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.ended:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"x-request-id"]
            headers.append((b"x-request-id", self._record.request_id.encode()))
            message = {**message, "headers": headers}
            self.started, self._record.status = True, message["status"]
        await self._send(message)
        # Only now: a client that leaves while the last part waits has not had it.
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.ended = True


def _client_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """What the client calls the request, or nothing when that is too long or not plain ASCII."""
    value = next((value for name, value in headers if name == b"x-client-request-id"), b"")
    plain = len(value) <= _LONGEST and all(32 <= sign < 127 for sign in value)
    return value.decode("ascii") if plain else ""


def _template(scope: Scope) -> str:
    # FastAPI's route of an included router does not know the router's prefix; what it calls the context does.
    context = scope.get("fastapi", {}).get("effective_route_context")
    paths = (getattr(route, "path", None) for route in (context, scope.get("route")))
    return next((path for path in paths if isinstance(path, str) and path), UNKNOWN)
