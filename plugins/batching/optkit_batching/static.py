"""Static batching: gather a batch, run it to completion, take the next."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import Field

from optkit.batching import Batcher, MemoryView, RequestView, Schedule, Wait
from optkit_batching.completion import continued, fitting, started

__all__ = ["Static"]


class Static(Batcher):
    """Runs requests in fixed batches. A batch starts when the one before has ended, and nothing joins it on its way.

    The simplest strategy and the baseline of the others: short requests wait for the longest of their batch.
    """

    max_batch_size: int = Field(default=1, ge=1, le=4096)
    """Sequences in one batch."""
    padded: bool = True
    """Whether a batch is a rectangle, as fixed shapes make it: prompts are padded to the longest, and sequences that
    ended are computed on until all have. Without it nothing is computed for nobody; every session can do that."""

    @property
    def max_sequences(self) -> int:
        return self.max_batch_size

    @property
    def pads_batches(self) -> bool:
        return self.padded

    def plan(
        self, waiting: Collection[RequestView], running: Collection[RequestView], memory: MemoryView, now: float
    ) -> Schedule | Wait:
        if running:
            return continued(running)
        batch = fitting(waiting, memory, self.max_batch_size, padded=self.padded)
        return started(batch, memory) if batch else Wait(None)
