"""One step of continuous batching, put together piece by piece within its budget of tokens, seats and blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from optkit.batching import MemoryView, Preemption, RequestView, Schedule, Share
from optkit_batching.continuous.admission import Admission, Room

__all__ = ["Step"]

_ONE = [1]


class Step:
    """A schedule under construction.

    Args:
        running: requests that hold blocks, first in the queue's order.
        memory: the KV cache, which does not change meanwhile.
        budget: tokens that the step computes at most.
        seats: sequences that are alive at most.
        preemption: how a request is evicted.
    """

    def __init__(
        self,
        running: Collection[RequestView],
        memory: MemoryView,
        *,
        budget: int,
        seats: int,
        preemption: Literal["recompute", "swap"],
    ) -> None:
        self._running, self._memory = running, memory
        self._decoding: list[RequestView] = []
        self._prompts: list[RequestView] = []
        for request in running:
            (self._decoding if _decodes(request) else self._prompts).append(request)
        self._free, self._budget = memory.free, budget
        self._seats, self._preemption = seats, preemption
        self._planned: dict[int, tuple[RequestView, list[int], int]] = {}
        self._evicted: dict[int, RequestView] = {}
        self._released = 0
        self._last = reversed(list(running))

    @property
    def idle(self) -> bool:
        """Whether nothing would be computed."""
        return not self._planned

    @property
    def empty(self) -> bool:
        """Whether nothing would happen at all."""
        return not (self._planned or self._evicted)

    def schedule(self) -> Schedule:
        """What came together."""
        shares = tuple(
            Share(sequence.id, count)
            for request, counts, _ in self._planned.values()
            for sequence, count in zip(request.sequences, counts, strict=True)
            if count
        )
        return Schedule(shares, tuple(Preemption(request, self._preemption) for request in self._evicted))

    def decode(self) -> None:
        """Compute the newest token of every sequence that lacks only that one, and drafts while there is budget."""
        spare = self._budget - sum(len(request.sequences) for request in self._decoding)
        for request in self._decoding:
            if request.id in self._evicted:
                continue
            sequences = request.sequences
            if len(sequences) == 1 and not sequences[0].drafts:  # nearly always
                self._place(request, _ONE)
                continue
            counts = [1] * len(sequences)
            guesses = sum(sequence.drafts for sequence in sequences)
            # Nobody is evicted for a guess.
            if 0 < guesses <= spare:
                bold = [1 + sequence.drafts for sequence in sequences]
                if self._memory.needed(request, bold) <= self._free:
                    counts, spare = bold, spare - guesses
            self._place(request, counts)

    def go_on_with_prompts(self) -> None:
        """Spend the budget on what is known of running requests and not computed."""
        for request in self._prompts:
            if self._budget <= 0:
                return
            if request.id not in self._evicted:
                self._place(request, self._chunk(request, 0))

    def admit(self, waiting: Iterable[RequestView], policy: Admission) -> None:
        """Let requests begin, strictly in the queue's order: who does not fit keeps all behind from going past."""
        if self._evicted:
            return
        room = Room(self._memory, self._running, self._free)
        seats = self._seats - sum(request.samples for request in self._running)
        for request in waiting:
            if self._budget <= 0 or request.samples > seats:
                return
            start = self._memory.start(request)
            chunk = self._chunk(request, start.cached)
            alone = not self._running and not room.admitted  # then it fits, or it would have been refused
            if not (policy.admits(request, start, chunk, room) or alone):
                return
            self._put(request, chunk, start.blocks + self._memory.needed(request, chunk, start.cached))
            room.free = self._free
            room.admitted.append((request, start))
            seats -= request.samples

    def _chunk(self, request: RequestView, cached: int) -> list[int]:
        left, counts = self._budget, []
        for sequence in request.sequences:
            counts.append(min(sequence.pending - cached, left))
            left -= counts[-1]
        return counts

    def _place(self, request: RequestView, counts: list[int]) -> None:
        needed = self._memory.needed(request, counts)
        while needed > self._free:
            # The queue's order backwards: the latest, or that of the lowest priority, goes first.
            victim = next(self._last)
            self._evict(victim)
            if victim is request:
                return
        self._put(request, counts, needed)

    def _put(self, request: RequestView, counts: list[int], blocks: int) -> None:
        self._planned[request.id] = request, counts, blocks
        self._free -= blocks
        self._budget -= sum(counts)

    def _evict(self, victim: RequestView) -> None:
        if victim.id in self._planned:
            _, counts, blocks = self._planned.pop(victim.id)
            self._free += blocks
            self._budget += sum(counts)
        self._evicted[victim.id] = victim
        # Of all together: blocks that only they share with each other become free when the last of them goes.
        released = self._memory.released(self._evicted.values())
        self._free += released - self._released
        self._released = released


def _decodes(request: RequestView) -> bool:
    sequences = request.sequences
    if len(sequences) == 1:  # nearly always, and this runs for every request in every step
        return sequences[0].pending == 1
    return all(sequence.pending == 1 for sequence in sequences)
