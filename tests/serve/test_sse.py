"""Events on the wire, and what happens when nobody reads them."""

from __future__ import annotations

import asyncio
import json

import pytest

from optkit.serve import sse


def test_an_event_is_lines_of_utf8():
    assert sse.event({"a": "é\n\u2028"}) == 'data: {"a":"é\\n\u2028"}\n\n'.encode()
    assert sse.event({}, "name") == b"event: name\ndata: {}\n\n"
    assert json.loads(sse.encoded({"half": "\ud800"})) == {"half": "?"}
    with pytest.raises(ValueError, match="JSON"):
        sse.encoded(float("nan"))


async def played(stream, leave_after=None):
    """What an ASGI response sends; the client leaves after so many messages."""
    sent, gone = [], asyncio.Event()

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len(sent) == leave_after:
            gone.set()

    await stream({"type": "http"}, receive, send)
    return sent


def test_a_stream_ends_when_its_events_do():
    async def events():
        yield b"one"
        yield b"two"

    start, *parts, end = asyncio.run(played(sse.EventStream(events())))
    assert dict(start["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in dict(start["headers"])
    assert [part["body"] for part in parts] == [b"one", b"two"]
    assert end == {"type": "http.response.body", "body": b"", "more_body": False}


def test_events_are_closed_when_the_client_leaves():
    closed = []

    async def events():
        try:
            while True:
                yield b"more"
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    with pytest.raises(sse.Disconnected):
        asyncio.run(played(sse.EventStream(events()), leave_after=3))
    assert closed == [True]


def test_silence_is_broken_by_comments(monkeypatch):
    monkeypatch.setattr(sse, "_PULSE_SECONDS", 0.01)

    async def main():
        quiet = asyncio.Event()

        async def events():
            yield b"one"
            await quiet.wait()
            yield b"two"

        sent = []

        async def send(message):
            sent.append(message.get("body"))
            if sent.count(b": waiting\n\n") == 2:
                quiet.set()

        async def receive():
            await asyncio.Event().wait()

        await sse.EventStream(events())({"type": "http"}, receive, send)
        return sent

    sent = asyncio.run(main())
    assert sent.index(b"one") < sent.index(b": waiting\n\n") < sent.index(b"two")


def test_an_exception_out_of_the_events_breaks_the_answer():
    async def events():
        yield b"one"
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(played(sse.EventStream(events())))
