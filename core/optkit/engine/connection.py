"""One worker process, and the socket pair over which its client talks to it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from signal import Signals
from typing import Any, Self

from optkit.engine import wire

__all__ = ["Connection"]

_LEAVE_SECONDS = 10.0
"""What a process may take to end when it is told to, or when it is dying."""
_WORDS_SECONDS = 1.0
"""What its last words may take to arrive; a child of its own may hold the other end open for ever."""


class Connection:
    """A process that runs `optkit.engine.worker`. Made by `start`, and ended by `end` in any case.

    Unlike a socket with a name, a socket pair is nobody else's to open, leaves nothing behind, and tells each side at
    once that the other one is gone.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._words: deque[str] = deque(maxlen=20)
        self._dead, self._silent = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for work, after in ((process.wait, self._bury), (self._listen, self._silent.set)):
            threading.Thread(target=_then, args=(work, loop, after), name="optkit-worker", daemon=True).start()

    @classmethod
    async def start(cls) -> Self:
        """Start a process. On Linux it dies with the thread that does this.

        Raises:
            OSError: the system has no room for it.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                # Not asyncio's: whether it gets to know the exit code of a process that it kills is a matter of luck.
                process = subprocess.Popen(
                    [sys.executable, "-m", "optkit.engine.worker", str(theirs.fileno()), str(os.getpid())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    process_group=0,  # what a terminal sends on Ctrl-C is for this process alone
                )
            except BaseException:
                writer.close()
                raise
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._dead.is_set()

    def send(self, frame: bytes) -> None:
        """Hand a message to the system, or to the buffer before it; to a dead process it is lost."""
        self._writer.write(frame)

    async def receive(self) -> list[Any] | None:
        """The next message, or None when nothing more comes: the process is dying or dead.

        Raises:
            ValueError: what came is no message.
        """
        try:
            size = wire.length(await self._reader.readexactly(wire.HEADER))
            return wire.unpack(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def hang_up(self) -> None:
        """Tell the process to end."""
        self._writer.close()

    def kill(self) -> None:
        """End it whatever it is doing."""
        self._process.kill()

    async def end(self) -> None:
        """Wait until the process has ended, by force if it takes its time."""
        self.hang_up()
        if not await _within(_LEAVE_SECONDS, self._dead):
            self.kill()
            await self._dead.wait()
        await _within(_WORDS_SECONDS, self._silent)

    @property
    def death(self) -> str:
        """What the process died of, after `end`."""
        code = self._process.returncode or 0
        if code == -9:
            return "the worker process was killed, most likely because memory ran out"
        if code < 0:
            return f"the worker process died of {Signals(-code).name}"
        last = next((line for line in reversed(self._words) if line), "it said nothing")
        return f"the worker process ended with code {code}: {last}"

    def _bury(self) -> None:
        self._dead.set()
        # What it sent last is still to be read, and then comes the end, unless a child of its own keeps that open.
        asyncio.get_running_loop().call_later(_WORDS_SECONDS, self._writer.transport.abort)

    def _listen(self) -> None:
        """Pass on what the process says, and keep the end of it."""
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                text = line.decode(errors="replace")
                self._words.append(text.strip())
                sys.stderr.write(text)
                sys.stderr.flush()


def _then(work: Callable[[], object], loop: asyncio.AbstractEventLoop, after: Callable[[], None]) -> None:
    work()
    with suppress(RuntimeError):  # the loop was closed, and nobody asks any more
        loop.call_soon_threadsafe(after)


async def _within(seconds: float, event: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()
