"""When a waiting request may begin. Each policy judges one request against what the batch has and may still want."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field

from optkit.batching import MemoryView, RequestView, Start, blocks_at_most

__all__ = ["POLICIES", "Admission", "NoReserve", "ReserveFull", "ReservePrompt", "Room", "Watermark"]


@dataclass(slots=True)
class Room:
    """What there is for newcomers in one step."""

    memory: MemoryView
    running: Collection[RequestView]
    """Before this step."""
    free: int
    """Blocks left after what the step has planned so far."""
    admitted: list[tuple[RequestView, Start]] = field(default_factory=list)
    """In this step."""


class Admission(ABC):
    """A policy, made anew for every step."""

    def __init__(self, watermark: float) -> None:
        self._watermark = watermark

    @abstractmethod
    def admits(self, request: RequestView, start: Start, chunk: list[int], room: Room) -> bool:
        """Whether a request may begin.

        Args:
            request: the next one in the queue.
            start: what beginning takes.
            chunk: tokens of each of its sequences that this step would compute.
            room: as it stands.
        """


class ReserveFull(Admission):
    """Every request has, from its beginning, a right to all blocks that it can ever want. Nobody is ever evicted."""

    _promised: int | None = None

    def admits(self, request: RequestView, start: Start, chunk: list[int], room: Room) -> bool:
        size = room.memory.caps.block_size
        if self._promised is None:
            self._promised = sum(blocks_at_most(one, size) - room.memory.held(one) for one in room.running)
        # Blocks of the prefix that somebody alive owns are there already, and stay as long as this request does.
        cost = blocks_at_most(request, size) - (start.cached // size - start.blocks if start.cached else 0)
        if self._promised + cost > room.memory.free:
            return False
        self._promised += cost
        return True


class ReservePrompt(Admission):
    """All that is known of a request must fit beside what the others have and still need for their prompts."""

    def admits(self, request: RequestView, start: Start, chunk: list[int], room: Room) -> bool:
        return self._left(request, start, room) >= 0

    def _left(self, request: RequestView, start: Start, room: Room) -> int:
        """Blocks left when it and all that are begun have computed what is known of them."""
        begun = [(one, Start(0, 0)) for one in room.running] + room.admitted
        own = start.blocks + _known(request, start, room.memory)
        taken = sum(first.blocks for _, first in room.admitted)
        return room.memory.free - taken - own - sum(_known(one, first, room.memory) for one, first in begun)


class Watermark(ReservePrompt):
    """As `ReservePrompt`, with a share of all blocks left over, so that outputs can grow for a while (vLLM)."""

    def admits(self, request: RequestView, start: Start, chunk: list[int], room: Room) -> bool:
        return self._left(request, start, room) >= self._watermark * room.memory.caps.blocks


class NoReserve(Admission):
    """What fits now may begin, whatever comes later."""

    def admits(self, request: RequestView, start: Start, chunk: list[int], room: Room) -> bool:
        return start.blocks + room.memory.needed(request, chunk, start.cached) <= room.free


def _known(request: RequestView, start: Start, memory: MemoryView) -> int:
    return memory.needed(request, [one.pending - start.cached for one in request.sequences], start.cached)


POLICIES: dict[str, type[Admission]] = {
    "reserve_full": ReserveFull,
    "reserve_prompt": ReservePrompt,
    "watermark": Watermark,
    "none": NoReserve,
}
