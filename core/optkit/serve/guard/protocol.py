"""HTTP/1.1 connections with bounds on size, number and time, for `uvicorn.Config(http=protocol_class(settings))`.

uvicorn reads a head of any size for any time, queues pipelined requests without bound, waits for ever for a client
that stopped reading, and takes trailers for headers. Here each of these ends the connection.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from optkit.serve.errors import ApiError
from optkit.serve.guard.origin import host_name
from optkit.serve.guard.transport import Closing
from optkit.serve.settings import Settings

__all__ = ["protocol_class"]

MAX_HEADERS = 100
MAX_URL = 8 * 1024
MAX_WAITING = 256 * 1024
"""Bytes of a next request that may come while the answer to the last one is under way."""

_CONTROL = re.compile(rb"%(?:[01][0-9A-Fa-f]|7[Ff])")


def protocol_class(settings: Settings) -> type[HttpToolsProtocol]:
    """The class of connections with the limits of `settings`."""

    class Bounded(_Connection):
        limits = settings

    return Bounded


class _PipelinedError(Exception):
    pass


class _Connection(HttpToolsProtocol):
    """One request at a time, heads within their size and time, no WebSockets.

    What comes before the answer to the request before it is over waits unread. Where it is too much, or came in one
    piece with that request, the connection closes after the answer, which clients that pipeline must expect:
    https://www.rfc-editor.org/rfc/rfc9112#section-9.3.2
    """

    limits: Settings

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.ws_protocol_class = None
        self.timeout_keep_alive = self.limits.keep_alive_timeout  # type: ignore[assignment]  # asyncio takes both.
        self._closing: Closing
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._silent = 0  # Bytes since a part of a request was last complete.
        self._deaf = False  # The parser is of no more use.
        self._waiting = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._closing = Closing(transport, self.loop, self.limits.write_timeout)
        super().connection_made(self._closing)
        if len(self.connections) > self.limits.max_connections:
            busy = ApiError(503, "too many connections are open", kind="server_error", headers={"retry-after": "1"})
            self._refuse(busy)
        else:
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        self._closing.lost()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        self._closing.finish()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._closing.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._closing.unwatch()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._deaf or self._closing.lingers:
            self._closing.discard(len(data))
        elif self._answering and self._in_head:
            # Quick clients send the next request when they have all of an answer, before the application says so.
            self._closing.unfinished = True
            self._waiting += data
            if len(self._waiting) > MAX_WAITING:
                self._end_after_answer()
        else:
            if self._in_head and self._head_timer is None:
                self._start_head_timer()
            try:
                self._parse(data)
            except _PipelinedError:
                self._end_after_answer()
            except ApiError as error:
                self._refuse(error)

    def _parse(self, data: bytes) -> None:
        while data:
            # A head is fed no further than its limit, so that the body behind it does not count.
            size = self.limits.max_header_bytes - self._silent if self._in_head else len(data)
            part, data = data[:size], data[size:]
            self._silent += len(part)
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade:
                # Whatever the client would like next, the answer is HTTP/1.1, and then the connection is over.
                raise _PipelinedError from None
            except httptools.HttpParserError as error:
                if isinstance(error.__context__, _PipelinedError | ApiError):
                    raise error.__context__ from None
                raise ApiError(400, "the request is not valid HTTP") from None
            if self._silent >= self.limits.max_header_bytes:
                raise ApiError(431, f"the head of the request is larger than {self.limits.max_header_bytes} bytes")

    def on_message_begin(self) -> None:
        if self._answering:
            raise _PipelinedError
        self._closing.unfinished = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL:
            raise ApiError(414, f"the URL is longer than {MAX_URL} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # A trailer: what came after the checks of the headers must not become one.
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise ApiError(431, f"the request has more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        self._check_head()
        self._stop_head_timer()
        self._in_head = False
        self._silent = 0
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """The parser's: the size of a chunk was read."""
        self._silent = 0

    def on_chunk_complete(self) -> None:
        """The parser's: a chunk was read."""
        self._silent = 0

    def on_body(self, body: bytes) -> None:
        self._silent = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._closing.unfinished = False
        self._in_head = True
        self._silent = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        data = bytes(self._waiting)
        self._waiting.clear()
        if data and not self._deaf and not self.transport.is_closing():
            self.data_received(data)

    def _check_head(self) -> None:
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise ApiError(400, "the version of HTTP is not 1.0 or 1.1")
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (version == "1.1" and not hosts):
            raise ApiError(400, "the request needs one Host header")
        if any(host_name(host.decode("latin-1")) is None for host in hosts):
            raise ApiError(400, "the Host header is not a host")
        if _CONTROL.search(self.url.partition(b"?")[0]):
            raise ApiError(400, "the path has control characters")
        framing = {name: value for name, value in self.headers if name in (b"transfer-encoding", b"content-length")}
        if framing.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
            raise ApiError(400, "the Transfer-Encoding is not chunked")
        if version == "1.0" and b"transfer-encoding" in framing:
            raise ApiError(400, "HTTP/1.0 has no Transfer-Encoding")
        if self.parser.should_upgrade() and framing:
            # The parser would take the body for what comes after the upgrade.
            raise ApiError(400, "a request with a body cannot ask for an upgrade")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def closing_early(scope: Any, receive: Any, send: Any) -> None:
            async def start(message: Any) -> None:
                # An answer before the end of the body is the last: what still comes is not worth reading.
                if cycle.more_body and not cycle.response_started:
                    cycle.keep_alive = False
                await send(message)

            await app(scope, receive, start)

        super()._start_asgi_task(cycle, closing_early)

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_after_answer(self) -> None:
        self._deaf = True
        self._waiting.clear()
        self._closing.unfinished = True
        self.cycle.keep_alive = False

    def _refuse(self, error: ApiError) -> None:
        self._deaf = True
        self._stop_head_timer()
        started = False
        if self._answering:
            started = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.flow.resume_writing()
        if not started:
            self._write(error)
        self.transport.close()

    def _write(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = self.server_state.default_headers + [
            (name.encode(), value.encode()) for name, value in (headers | error.headers).items()
        ]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in lines)
        self.transport.write(STATUS_LINE[error.status] + head + b"\r\n" + body)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_timeout, self._head_took_too_long)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_took_too_long(self) -> None:
        self._head_timer = None
        if self._silent:
            self._refuse(ApiError(408, "the head of the request took too long to arrive"))
        else:
            self.transport.close()
