"""Static batching: gather a batch, run it to completion, take the next."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from optkit.batching import Batcher, MemoryView, SequenceView, Wait
from optkit.steps import Row, StepPlan

__all__ = ["Static"]


class Static(Batcher):
    """Runs requests in fixed batches. A batch starts when the one before has ended, and nothing joins it on its way.

    The simplest strategy and the baseline of the others: short requests wait for the longest of their batch.
    """

    max_batch_size: int = Field(default=1, ge=1, le=4096)
    """Requests in one batch."""

    @property
    def max_sequences(self) -> int:
        return self.max_batch_size

    def plan(
        self, waiting: Sequence[SequenceView], running: Sequence[SequenceView], memory: MemoryView, now: float
    ) -> StepPlan | Wait:
        if running:
            return StepPlan(tuple(_row(sequence, sequence.blocks) for sequence in running))
        rows: list[Row] = []
        free = list(memory.free)
        for sequence in waiting[: min(self.max_batch_size, memory.caps.max_batch_size)]:
            needed = -(-sequence.max_total // memory.caps.block_size)
            if needed > len(free):
                break
            blocks, free = tuple(free[:needed]), free[needed:]
            rows.append(_row(sequence, blocks))
        return StepPlan(tuple(rows)) if rows else Wait(None)


def _row(sequence: SequenceView, blocks: tuple[int, ...]) -> Row:
    return Row(sequence.id, sequence.tokens[sequence.computed :], sequence.computed, blocks)
