"""What a batcher sees, made by hand, so that a strategy is tested plan by plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count

from optkit.batching import RequestView, Start
from optkit.steps import Caps

__all__ = ["FakeMemory", "FakeRequest", "FakeSequence", "decoding"]

_ids = count(1000)


@dataclass
class FakeSequence:
    """See `optkit.batching.SequenceView`."""

    pending: int
    computed: int = 0
    drafts: int = 0
    id: int = field(default_factory=lambda: next(_ids))


@dataclass
class FakeRequest:
    """See `optkit.batching.RequestView`. Without `sequences` it is a new request."""

    id: int
    prompt_tokens: int = 8
    max_tokens: int = 8
    samples: int = 1
    priority: int = 0
    arrived: float = 0.0
    sequences: list[FakeSequence] = field(default_factory=list)
    hits: int = 0
    """Tokens that the prefix cache would bring."""

    def __post_init__(self) -> None:
        self.sequences = self.sequences or [FakeSequence(self.prompt_tokens)]


def decoding(id: int, computed: int = 9, samples: int = 1, drafts: int = 0, **fields: int) -> FakeRequest:
    """A request whose samples need one token each."""
    rows = [FakeSequence(1, computed, drafts) for _ in range(samples)]
    return FakeRequest(id, samples=samples, sequences=rows, **fields)


@dataclass
class FakeMemory:
    """See `optkit.batching.MemoryView`. A sequence has the blocks that its computed tokens fill, and shares none."""

    free: int = 100
    block_size: int = 4
    rows: int = 64
    mixed: bool = True

    @property
    def caps(self) -> Caps:
        return Caps("paged", self.block_size, 100, self.rows, self.mixed, 50, 400)

    def start(self, request: RequestView) -> Start:
        assert isinstance(request, FakeRequest)
        return Start(request.hits, request.hits // self.block_size)

    def needed(self, request: RequestView, tokens: Sequence[int], cached: int = 0) -> int:
        return sum(
            -(-(one.computed + cached + new) // self.block_size) - -(-(one.computed + cached) // self.block_size)
            for one, new in zip(request.sequences, tokens, strict=True)
        )

    def held(self, request: RequestView) -> int:
        return sum(-(-one.computed // self.block_size) for one in request.sequences)

    def released(self, requests: Collection[RequestView]) -> int:
        return sum(self.held(request) for request in requests)
