"""A request inside the engine: a group of sequences, one for each sample, that lives and is evicted as a whole."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optkit.engine.request import FinishReason, Request, TokenLogprob
from optkit.engine.structure import Matcher

__all__ = ["Group", "Saved", "Sequence"]


class Sequence:
    """One sample of a request. Implements `optkit.batching.SequenceView`."""

    __slots__ = (
        "blocks",
        "computed",
        "draft",
        "finished",
        "group",
        "handle",
        "id",
        "keys",
        "matcher",
        "sample",
        "tokens",
    )

    def __init__(self, id: int, sample: int, group: Group) -> None:
        self.id = id
        self.sample = sample
        self.group = group
        # An array and no list: Python's garbage collector would look at every token of every waiting request.
        self.tokens = array("q", group.request.prompt)
        self.computed = 0
        self.blocks: tuple[int, ...] = ()
        self.keys: list[bytes] = []
        """Of the prefix cache, one for each full block of `tokens`, made when needed."""
        self.draft: tuple[int, ...] = ()
        self.handle = -1
        """The sampler's, from the first step on."""
        self.matcher: Matcher | None = None
        self.finished: FinishReason | None = None

    @property
    def target(self) -> int:
        """Tokens to compute before the next thing happens: a new token, or the fork of the samples."""
        return len(self.tokens) if self.group.forked else self.group.prompt_tokens

    @property
    def output(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.group.prompt_tokens

    @property
    def pending(self) -> int:
        group = self.group  # as `target`, without the call: this is asked for every sequence in every step
        return (len(self.tokens) if group.forked else group.prompt_tokens) - self.computed

    @property
    def drafts(self) -> int:
        return len(self.draft)


@dataclass(frozen=True, slots=True)
class Saved:
    """The KV of a request that was swapped out."""

    contents: npt.NDArray[np.generic]
    """`[blocks, ...]` in host memory."""
    places: dict[int, tuple[int, ...]]
    """By sequence id, where its blocks are in `contents`; samples share some."""

    @property
    def used(self) -> list[int]:
        """Places that some sequence still needs."""
        return sorted({place for own in self.places.values() for place in own})


class Group:
    """A request with all its samples. Implements `optkit.batching.RequestView`."""

    __slots__ = (
        "arrived",
        "cached",
        "deadline",
        "forked",
        "id",
        "key",
        "live",
        "max_tokens",
        "max_total",
        "priority",
        "prompt_logprobs",
        "prompt_tokens",
        "request",
        "running",
        "saved",
        "scored",
        "seed",
        "told",
    )

    def __init__(self, id: int, request: Request, ids: Iterable[int], seed: int, arrived: float) -> None:
        self.id = id
        self.request = request
        self.prompt_tokens = len(request.prompt)
        self.max_tokens = request.params.max_tokens
        self.max_total = self.prompt_tokens + self.max_tokens
        """Tokens of one sample at most."""
        self.priority = request.priority
        self.arrived = arrived
        self.deadline = None if request.timeout is None else arrived + request.timeout
        self.seed = seed
        self.key: tuple[float, ...] = ()
        """Its place in the queue; the engine asks the batcher once."""
        self.forked = request.params.samples == 1
        """Whether the prompt is computed and every sample has it. One sample needs no fork."""
        self.live = [Sequence(one, sample, self) for sample, one in enumerate(ids)]
        self.running = False
        """Whether it holds blocks; otherwise it waits."""
        self.told = False
        """Whether an event has brought what is known of its prompt."""
        self.scored = request.params.prompt_logprobs is not None
        """Whether log probabilities of its prompt are wanted."""
        self.saved: Saved | None = None
        self.cached = 0
        """Prompt tokens that were found in the prefix cache when it first began."""
        self.prompt_logprobs: list[TokenLogprob] = []

    @property
    def sequences(self) -> list[Sequence]:
        return self.live if self.forked else self.live[:1]

    @property
    def samples(self) -> int:
        return len(self.live)

    def blocks(self) -> list[int]:
        """Different blocks of all samples, in order of appearance."""
        if len(self.live) == 1:
            return list(self.live[0].blocks)
        return list(dict.fromkeys(block for sequence in self.live for block in sequence.blocks))
