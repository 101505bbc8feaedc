"""A connection that ends: never by waiting for ever, and so that the client can read why."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["Closing"]

_LINGER = 2.0  # Seconds that a client has to read an answer that was given before its request was over.
_LINGER_BYTES = 1 << 20


class Closing(asyncio.Transport):
    """A transport that gives up clients that stop reading, and does not lose an answer to a request still coming in.

    A socket closed with input unread sends a reset, and at a reset the client's system throws away what it received.
    So the answer is followed by the end of our side only, and what still comes is thrown away for a while:
    https://www.rfc-editor.org/rfc/rfc9112#section-9.6

    Args:
        transport: of the event loop.
        loop: that it runs on.
        timeout: seconds without one byte leaving, after which a client that should read counts as gone.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, timeout: float) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._timeout = timeout
        self._stall: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._unsent = 0
        self._discarded = 0
        self.unfinished = False
        """Whether a request is coming in, so that closing must linger."""

    @property
    def lingers(self) -> bool:
        """Whether all is said, and what comes goes to `discard`."""
        return self._linger is not None

    def discard(self, size: int) -> None:
        """Count bytes that came and are of no use; too many end the connection."""
        self._discarded += size
        if self._discarded > _LINGER_BYTES:
            self._transport.abort()

    def watch(self) -> None:
        """Abort when, from now on, nothing leaves for the time allowed."""
        if self._stall is None:
            self._unsent = self._transport.get_write_buffer_size()
            self._stall = self._loop.call_later(self._timeout, self._check)

    def unwatch(self) -> None:
        """The client reads."""
        if self._stall is not None and not self.is_closing():
            self._stall.cancel()
            self._stall = None

    def lost(self) -> None:
        """The connection is gone."""
        for timer in (self._stall, self._linger):
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self.unfinished or not self._transport.can_write_eof():
            self.finish()
            return
        self._linger = self._loop.call_later(_LINGER, self.finish)
        if not self._transport.is_reading():
            self._transport.resume_reading()
        try:
            self._transport.write_eof()
        except OSError:  # The client is gone already.
            self._transport.abort()

    def finish(self) -> None:
        """Close now, once what was written has left."""
        if not self._transport.is_closing():
            self._transport.close()
            self.watch()

    def _check(self) -> None:
        self._stall = None
        if self._transport.get_write_buffer_size() >= self._unsent:
            self._transport.abort()
        else:
            self.watch()

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.lingers:
            self._transport.write(data)

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self.is_closing():
            self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
