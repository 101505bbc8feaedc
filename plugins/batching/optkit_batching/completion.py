"""What strategies share that run a batch to completion: nobody joins it on its way."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from optkit.batching import MemoryView, RequestView, Schedule, Share, blocks_in_rectangle

__all__ = ["continued", "fitting", "started"]


def continued(running: Collection[RequestView]) -> Schedule:
    """The next step of a batch under way. Blocks for it are sure: `fitting` counted all that it can ever want."""
    return Schedule(
        tuple(
            Share(sequence.id, sequence.pending + sequence.drafts)
            for request in running
            for sequence in request.sequences
        )
    )


def fitting(
    waiting: Iterable[RequestView], memory: MemoryView, max_batch_size: int, *, padded: bool
) -> list[RequestView]:
    """The first of the waiting requests that fit into one batch, with all the output that they may have.

    Args:
        waiting: in the order to take them in.
        memory: the KV cache.
        max_batch_size: sequences.
        padded: every prompt takes as much room as the longest of the batch.
    """
    seats, size = min(max_batch_size, memory.caps.max_batch_size), memory.caps.block_size
    batch: list[RequestView] = []
    width = blocks = 0
    for request in waiting:
        seats -= request.samples
        if request.max_tokens:
            if padded and request.prompt_tokens > width:
                width = request.prompt_tokens
                blocks = sum(blocks_in_rectangle(one, size, width) for one in batch)
            blocks += blocks_in_rectangle(request, size, width)
        if seats < 0 or blocks > memory.free:
            break
        batch.append(request)
    return batch


def started(requests: Iterable[RequestView], memory: MemoryView) -> Schedule:
    """The first step of a batch: whole prompts, but for what the prefix cache has of them."""
    return Schedule(
        tuple(
            Share(sequence.id, sequence.pending - memory.start(request).cached)
            for request in requests
            for sequence in request.sequences
        )
    )
