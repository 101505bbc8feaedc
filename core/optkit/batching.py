"""Batching strategies. Pure: no thread, no clock, no torch, so that they are tested by asserts without sleeping."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from optkit.options import Options
from optkit.steps import Caps, StepPlan

__all__ = ["Batcher", "MemoryView", "SequenceView", "Wait"]


@dataclass(frozen=True, slots=True)
class SequenceView:
    """What a batcher sees of one sequence."""

    id: int
    tokens: tuple[int, ...]
    """Prompt and output so far."""
    computed: int
    """How many of them are in the KV cache."""
    max_total: int
    """Tokens that it can grow to."""
    blocks: tuple[int, ...]
    """The blocks that it holds."""
    arrived: float
    """Seconds on the same clock as `now`."""


@dataclass(frozen=True, slots=True)
class MemoryView:
    """What a batcher sees of the KV cache."""

    caps: Caps
    free: tuple[int, ...]
    """Ids of the free blocks, in the order in which to take them."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to run now."""

    seconds: float | None
    """Ask again after this long, or None: when something arrives or ends."""


class Batcher(Options):
    """Decides which sequences take part in the next step, and with which blocks."""

    @property
    @abstractmethod
    def max_sequences(self) -> int:
        """Sequences that it keeps alive at once; a session is opened for that many."""

    @abstractmethod
    def plan(
        self, waiting: Seq[SequenceView], running: Seq[SequenceView], memory: MemoryView, now: float
    ) -> StepPlan | Wait:
        """The next step. A row of a waiting sequence starts it, with blocks taken from `memory.free`.

        Args:
            waiting: sequences that hold no block, in order of arrival.
            running: sequences that hold blocks, in order of their start.
        """
