"""What every endpoint reads from its request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from fastapi import Request, Response

from optkit.serve.errors import ApiError
from optkit.serve.serving import Serving
from optkit.serve.sse import EventStream, json_reply, unless_disconnected
from optkit.serve.work import Asker

__all__ = ["asker_of", "serving_of", "streamed", "whole"]

TIMEOUT = "x-request-timeout"
"""A header: seconds after which the client has no use for the answer."""


def serving_of(request: Request) -> Serving:
    """What this server serves."""
    serving = request.app.state.serving
    assert isinstance(serving, Serving)
    return serving


def asker_of(request: Request) -> Asker:
    """Who asks.

    Raises:
        ApiError: the header with the timeout is no number of seconds.
    """
    most = serving_of(request).settings.request_timeout
    given = request.headers.get(TIMEOUT)
    try:
        timeout = most if given is None else float(given)
    except ValueError:
        timeout = 0.0
    if not timeout > 0:
        raise ApiError(400, f"{TIMEOUT}: give seconds, more than 0", param=TIMEOUT)
    return Asker(request.state.tenant, request.state.record, min(timeout, most))


async def whole(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """An answer in one piece; what makes it is cancelled when the client goes away."""
    return json_reply(await unless_disconnected(request.receive, work))


async def streamed(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """An answer as events. What goes wrong before the first one is an error with its status."""
    first = await unless_disconnected(request.receive, _first(events))
    return EventStream(_after(first, events))


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    try:
        return await anext(events)
    except BaseException:
        await events.aclose()
        raise


async def _after(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    try:
        if first:
            yield first
        async for one in events:
            yield one
    finally:
        await events.aclose()
