"""Requests, and the sequences that they become inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from optkit.batching import SequenceView

__all__ = ["Event", "FinishReason", "Request", "SamplingParams", "Sequence"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the output of one request is chosen."""

    max_tokens: int = 128
    """Output tokens at most."""
    temperature: float = 0.0
    """0 takes the most likely token; above, logits are divided by it before sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this (nucleus sampling, arXiv:1904.09751)."""
    seed: int = 0
    """The draw depends on this and on the position alone, whatever else is in the batch."""
    stop_token_ids: tuple[int, ...] = ()
    """Output ends with the first of these; the token itself is given out."""
    ignore_eos: bool = False
    """Go on to `max_tokens`, whatever comes. Benchmarks need it for equal work."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("max_tokens is at least 1, temperature at least 0, and top_p in (0, 1]")


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids to continue."""

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Event:
    """One new token of one request."""

    request: int
    token: int
    finished: FinishReason | None


@dataclass(slots=True)
class Sequence:
    """A request under way."""

    id: int
    request: Request
    tokens: list[int]
    arrived: float
    computed: int = 0
    blocks: tuple[int, ...] = ()

    @property
    def max_total(self) -> int:
        return len(self.request.prompt) + self.request.params.max_tokens

    @property
    def output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    def view(self) -> SequenceView:
        """What the batcher may see."""
        return SequenceView(self.id, tuple(self.tokens), self.computed, self.max_total, self.blocks, self.arrived)
