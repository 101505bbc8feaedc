"""Server-sent events, and answers that end when nobody waits for them any more.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["DONE", "Disconnected", "EventStream", "encoded", "event", "json_reply", "unless_disconnected"]

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_PULSE = b": waiting\n\n"
_PULSE_SECONDS = 15.0
"""After so long without an event a comment is sent, so that no proxy takes the connection for dead."""
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def encoded(data: Any) -> bytes:
    """JSON in UTF-8. Halves of surrogate pairs, which JSON requests can hold and answers may repeat, become `?`."""
    return _json(data).encode("utf-8", "replace")


def json_reply(data: Any, status: int = 200) -> Response:
    """An answer of one JSON value."""
    return Response(encoded(data), status, media_type="application/json")


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event."""
    head = b"event: " + name.encode() + b"\ndata: " if name else b"data: "
    return head + encoded(data) + b"\n\n"


class EventStream(Response):
    """Sends events as they come, and closes their source when the client goes away.

    Args:
        events: of `event`. An exception out of them breaks the connection, as a client must not take what it has for
            everything.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pulse = asyncio.create_task(self._pulse(send))
        try:
            await unless_disconnected(receive, self._send_all(send))
        finally:
            pulse.cancel()
            with suppress(asyncio.CancelledError):
                await pulse

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for one in events:
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": one, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pulse(self, send: Send) -> None:
        while True:
            await asyncio.sleep(_PULSE_SECONDS)
            if time.monotonic() - self._sent >= _PULSE_SECONDS:
                await send({"type": "http.response.body", "body": _PULSE, "more_body": True})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled as soon as the client is gone.

    Args:
        receive: of a request whose body was read.
        work: waits for an engine, or sends an answer.

    Raises:
        Disconnected: the client is gone.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError):
                    await one


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Disconnected(Exception):
    """The client went away before it got its answer."""
