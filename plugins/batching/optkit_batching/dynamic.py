"""Dynamic batching: a batch starts when it is full, or when its oldest request has waited long enough."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import Field

from optkit.batching import Batcher, MemoryView, RequestView, Schedule, Wait
from optkit_batching.completion import continued, fitting, started

__all__ = ["Dynamic"]

_CLOCK_SECONDS = 1e-6
"""What rounding may leave of a delay that is over."""


class Dynamic(Batcher):
    """Holds requests back for a moment, so that those that come one by one share a batch.

    What single-step models are served with. Requests of a causal language model run to completion in their batch, as
    with `static`, and the next batch gathers meanwhile.

    Document: the dynamic batcher of Triton Inference Server,
    https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/batcher.html
    """

    max_batch_size: int = Field(default=32, ge=1, le=4096)
    """Sequences in one batch. So many of them never wait."""
    max_queue_delay_ms: float = Field(default=5.0, ge=0, le=60_000)
    """Milliseconds that the oldest request waits for company at most. 0 runs whatever is there."""

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
        batch = fitting(waiting, memory, self.max_batch_size, padded=True)
        if not batch:
            return Wait(None)
        seats = min(self.max_batch_size, memory.caps.max_batch_size) - sum(request.samples for request in batch)
        left = batch[0].arrived + self.max_queue_delay_ms / 1e3 - now
        # Whoever waits behind a batch could not join it by waiting longer.
        full = seats <= 0 or len(batch) < len(waiting)
        return started(batch, memory) if full or left <= _CLOCK_SECONDS else Wait(left)
