"""Blocking calls from the event loop, which always run to their end: whoever cleans up afterwards is alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["Threads"]

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A few threads that make calls. One makes them one after the other: a SQLite connection belongs to one thread.

    Not the event loop's own, in which prompts of requests are encoded: those must not wait for a disk.

    Args:
        count: of threads.
    """

    def __init__(self, count: int) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix="batches")

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it there. Cancelled, this still waits until the call is over."""
        call = asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            await asyncio.wait((call,))
            if not call.cancelled():
                call.exception()  # nobody else asks
            raise

    def close(self) -> None:
        """End the threads, once what they do is done."""
        self._executor.shutdown()
