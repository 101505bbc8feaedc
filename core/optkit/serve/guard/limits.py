"""How large a body may be, also after decompression, and how long it may take."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optkit.serve.errors import ApiError
from optkit.serve.guard.decoding import Decoder
from optkit.serve.guard.replies import send_error
from optkit.serve.settings import Settings

__all__ = ["Limits"]

UPLOADS = "/v1/files"
"""The one path whose bodies have the limit of files; they are never held in memory whole."""

_ENVELOPE = 64 * 1024  # Of the form around an uploaded file.
_PIECE = 64 * 1024
_MIB = 1 << 20
# What was not read of a refused body would be taken for the next request.
_CLOSE = {"connection": "close"}


class Limits:
    """ASGI middleware that stops a body at its limit, and decompresses it on the way.

    A body is stopped by an error raised where the application reads it. Whatever the application makes of that error,
    the client gets the one of here.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = scope["method"] == "POST" and scope["path"] == UPLOADS
        limit = self._settings.max_file_bytes + _ENVELOPE if upload else self._settings.max_body_bytes
        try:
            body = _Body(scope, receive, limit, self._settings.body_timeout, per_mib=upload)
        except ApiError as error:
            await send_error(error, scope, receive, send)
            return
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if body.error is None or started:
                started = True
                await send(message)

        try:
            await self._app(scope, body.receive, guarded)
        except Exception:
            # What the application made of the body's error on its way out is not an error of its own.
            if body.error is None or started:
                raise
        if body.error is not None and not started:
            await send_error(body.error, scope, receive, send)


class _Body:
    """Stands between the server and an application that reads a body.

    Raises:
        ApiError: 413 for a declared length over the limit, 415 for an unknown encoding.
    """

    def __init__(self, scope: Scope, receive: Receive, limit: int, timeout: float, *, per_mib: bool) -> None:
        headers = Headers(scope=scope)
        self.error: ApiError | None = None
        self._receive = receive
        self._limit = limit
        self._timeout = timeout
        self._per_mib = per_mib
        self._deadline = 0.0
        self._read = 0
        self._given = 0
        self._arriving = True
        self._complete = False
        lengths = headers.getlist("content-length")
        if not all(length.isascii() and length.isdigit() for length in lengths):
            raise ApiError(400, "the Content-Length header is not a number", headers=_CLOSE)
        if any(len(length) > 18 or int(length) > limit for length in lengths):
            raise self._too_large()
        self._decoder = _decoder(scope, headers)

    async def receive(self) -> Message:
        """As ASGI's.

        Raises:
            ApiError: 400, 408 or 413, and again whenever it is called after that.
        """
        if self.error is not None:
            raise self.error
        if self._complete:
            return await self._receive()
        try:
            return await self._next()
        except ApiError as error:
            error.headers |= _CLOSE
            self.error = error
            raise

    async def _next(self) -> Message:
        if self._decoder is None:
            message = await self._arrival()
            self._complete = not self._arriving
            return message
        if not self._decoder.hungry:
            # A small piece of input gives many of output: others get their turn between them.
            await asyncio.sleep(0)
        while self._decoder.hungry and self._arriving:
            message = await self._arrival()
            if message["type"] != "http.request":
                return message
            self._decoder.feed(message.get("body", b""))
        wanted = min(_PIECE, self._limit + 1 - self._given)
        piece = self._decoder.take(wanted)
        self._given += len(piece)
        if self._given > self._limit:
            raise self._too_large()
        # After a full piece the decoder may hold more, although all its input is taken.
        self._complete = not self._arriving and self._decoder.hungry and len(piece) < wanted
        if self._complete and self._read:
            self._decoder.end()
        return {"type": "http.request", "body": piece, "more_body": not self._complete}

    async def _arrival(self) -> Message:
        now = asyncio.get_running_loop().time()
        if not self._deadline:
            self._deadline = now + self._timeout
        allowed = self._timeout * (self._read // _MIB) if self._per_mib else 0.0
        try:
            async with asyncio.timeout_at(self._deadline + allowed):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive") from None
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._arriving = message.get("more_body", False)
            if self._read > self._limit:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit} bytes", code="request_too_large", headers=_CLOSE)


def _decoder(scope: Scope, headers: Headers) -> Decoder | None:
    encodings = [encoding for encoding in headers.getlist("content-encoding") if encoding.strip().lower() != "identity"]
    if not encodings:
        return None
    decoder = Decoder(",".join(encodings))
    # In place: what is outside reads in the same scope what the router found. The length is of what was sent.
    scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in (b"content-encoding", b"content-length")]
    return decoder
