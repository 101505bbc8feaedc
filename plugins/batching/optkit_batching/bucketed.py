"""Bucketed batching: requests of similar length run together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import islice

from pydantic import Field

from optkit.batching import Batcher, MemoryView, RequestView, Schedule, Wait
from optkit_batching.completion import continued, fitting, started

__all__ = ["Bucketed"]

_BATCHES_AHEAD = 64
"""How far into the queue it looks, in full batches: neighbours are found there, and a long queue costs no more."""


class Bucketed(Batcher):
    """Grows each batch around the oldest waiting request, from those nearest to it in length.

    The oldest is in the next batch whatever its length, so nobody starves. Like `static` it runs a batch to completion
    and waits for no one. Buckets are not fixed ranges of length: they follow from who waits.

    Document: Khomenko et al., Accelerating recurrent neural network training using sequence bucketing and multi-GPU
    data parallelization, arXiv:1708.05604.
    """

    max_batch_size: int = Field(default=32, ge=1, le=4096)
    """Sequences in one batch."""
    max_padding: float = Field(default=0.2, ge=0, lt=1)
    """Share of a batch's tokens that may be padding."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one batch at most, padding included, which bounds its memory. A request that is longer runs alone."""

    @property
    def max_sequences(self) -> int:
        return self.max_batch_size

    @property
    def pads_batches(self) -> bool:
        return True

    def plan(
        self, waiting: Collection[RequestView], running: Collection[RequestView], memory: MemoryView, now: float
    ) -> Schedule | Wait:
        if running:
            return continued(running)
        batch = self._around_the_oldest(list(islice(waiting, _BATCHES_AHEAD * self.max_batch_size)), memory)
        return started(batch, memory) if batch else Wait(None)

    def _around_the_oldest(self, queue: list[RequestView], memory: MemoryView) -> list[RequestView]:
        if not queue:
            return []
        oldest = queue[0].prompt_tokens
        queue.sort(key=lambda request: abs(request.prompt_tokens - oldest))  # stable: of equals the older first
        return fitting(self._alike(queue), memory, self.max_batch_size, padded=True)

    def _alike(self, nearest: Iterable[RequestView]) -> Iterable[RequestView]:
        longest = tokens = count = 0
        most = self.max_batch_tokens
        for request in nearest:
            if most is not None and count and longest * (count + 1) > most:
                return  # nobody fits any more, however short
            length = request.prompt_tokens
            padded = max(longest, length) * (count + 1)
            within = tokens + length >= (1 - self.max_padding) * padded and padded <= (most or padded)
            if within or not count:
                longest, tokens, count = max(longest, length), tokens + length, count + 1
                yield request
