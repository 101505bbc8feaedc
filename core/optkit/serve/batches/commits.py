"""Answers that come while a transaction is under way go together into the next: a sync for each would set the pace."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from optkit.errors import MachineError
from optkit.serve.batches.objects import Answer

__all__ = ["Commits"]

_log = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0
"""After a disk that had no room."""


class Commits:
    """Hands answers to the store.

    Args:
        write: keeps answers, all or none.
    """

    def __init__(self, write: Callable[[Sequence[Answer]], Awaitable[None]]) -> None:
        self._write = write
        self._waiting: list[tuple[Answer, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def add(self, answer: Answer) -> None:
        """Returns when the answer is on the disk. While there is no room this waits, and what waits for it with it."""
        kept = asyncio.get_running_loop().create_future()
        self._waiting.append((answer, kept))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        await kept

    async def close(self) -> None:
        """Wait for the transaction under way; what has none yet is computed again after the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _drain(self) -> None:
        while self._waiting:
            # Whoever does not wait any more may have the same line answered again.
            group = [(answer, kept) for answer, kept in self._waiting if not kept.done()]
            self._waiting = []
            try:
                await self._write([answer for answer, _ in group])
            except MachineError as error:
                _log.error("answers wait to be kept: %s", error)
                self._waiting = [*group, *self._waiting]
                await asyncio.sleep(_AGAIN_SECONDS)
            except Exception as error:
                for _, kept in group:
                    if not kept.done():
                        kept.set_exception(error)
            else:
                for _, kept in group:
                    if not kept.done():
                        kept.set_result(None)
