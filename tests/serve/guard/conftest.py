"""A server whose application only tells what reached it, and clients that speak to its socket themselves."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from optkit.serve.guard.protocol import protocol_class
from optkit.serve.settings import Settings

PATIENCE = 20.0  # Of a test that waits for what must happen; no test waits for this long when all is well.


@dataclass
class Echo:
    """Answers what it received. `/wait` answers a piece and waits, `/flood` never stops, `/early` reads no body.

    `/late` sends its whole answer and says only after `release` that it is whole.
    """

    seen: list[str] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    waiting: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            self.seen.append(scope["type"])
            return
        self.seen.append(f"{scope['method']} {scope['path']}")
        if scope["path"] in ("/wait", "/flood"):
            await self._go_on(scope, receive, send)
        elif scope["path"] == "/early":
            await _answer(send, {})
        elif scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
            await send({"type": "http.response.body", "body": b"late", "more_body": True})
            await asyncio.to_thread(self.release.wait, PATIENCE)
            await send({"type": "http.response.body"})
        else:
            body = await _read(receive)
            headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]]
            digest = hashlib.sha256(body).hexdigest()
            await _answer(send, {"path": scope["path"], "headers": headers, "length": len(body), "sha256": digest})

    async def _go_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _read(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        self.waiting.set()
        for _ in range(4096 if scope["path"] == "/flood" else 0):
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        self.gone.set()


async def _read(receive: Receive) -> bytes:
    body, message = b"", {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    return body


async def _answer(send: Send, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Answer:
    """What a server said. `closes` where it said that the connection ends."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


def listen(connection: socket.socket, method: str = "GET") -> Answer:
    """Read one answer."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return Answer(response.status, response.headers, response.read())


def ends(connection: socket.socket) -> bool:
    """Wait until the server ends the connection."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


@dataclass
class Running:
    """A server that runs."""

    app: Echo
    port: int

    listen = staticmethod(listen)
    ends = staticmethod(ends)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def head(self, line: str, *headers: str) -> bytes:
        """Of a request, with a Host header."""
        lines = [f"{line} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", *headers, "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def ask(self, line: str, *headers: str, body: bytes = b"") -> Answer:
        """One request on a connection of its own."""
        return self.say(self.head(line, *headers) + body, method=line.split()[0])

    def say(self, data: bytes, method: str = "GET") -> Answer:
        """Bytes as they are, on a connection of their own."""
        with self.connect() as connection:
            connection.sendall(data)
            return listen(connection, method)


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts servers: `start(wrap, loop=..., **settings)`; `wrap(app, settings)` puts middleware around the echo."""
    started: list[tuple[uvicorn.Server, threading.Thread]] = []

    def begin(
        wrap: Callable[[ASGIApp, Settings], ASGIApp] = lambda app, _: app, loop: Any = "uvloop", **chosen: Any
    ) -> Running:
        app, settings = Echo(), Settings(**chosen)
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            wrap(app, settings), http=protocol_class(settings), ws="none", loop=loop, lifespan="off", log_config=None
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        started.append((server, thread))
        return Running(app, listener.getsockname()[1])

    yield begin
    for server, _ in started:
        server.should_exit = True
    for _, thread in started:
        thread.join(PATIENCE)
        assert not thread.is_alive()
