"""Batching strategies. Pure: no thread, no clock, no torch, so that they are tested by asserts without sleeping.

A batcher decides *who* computes *how many tokens* next and who must make room. Which blocks hold them is the pool's
business: with shared prefixes and copies on write, no batcher could say it right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from optkit.options import Options
from optkit.steps import Caps

__all__ = [
    "Batcher",
    "MemoryView",
    "Preemption",
    "RequestView",
    "Schedule",
    "SequenceView",
    "Share",
    "Start",
    "Wait",
    "blocks_at_most",
    "blocks_in_rectangle",
]


class SequenceView(Protocol):
    """What a batcher sees of one sequence: one sample of a request. Live and read-only."""

    @property
    def id(self) -> int: ...

    @property
    def computed(self) -> int:
        """Tokens in the KV cache."""
        ...

    @property
    def pending(self) -> int:
        """Tokens that are known and not in the KV cache yet; at least one."""
        ...

    @property
    def drafts(self) -> int:
        """Guessed tokens after them, which a step may check or leave out."""
        ...


class RequestView(Protocol):
    """What a batcher sees of one request, the unit that is admitted and evicted whole. Live and read-only."""

    @property
    def id(self) -> int: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """Output tokens of each sample at most; 0 for a model of one step."""
        ...

    @property
    def samples(self) -> int:
        """Samples that are not finished; each becomes a row of its own once the prompt is computed."""
        ...

    @property
    def priority(self) -> int:
        """Lower comes first."""
        ...

    @property
    def arrived(self) -> float:
        """Seconds, on the clock of `now`."""
        ...

    @property
    def sequences(self) -> Sequence[SequenceView]:
        """Those that can take part in a step: one until the prompt is computed, then every unfinished sample."""
        ...


@dataclass(frozen=True, slots=True)
class Start:
    """What it takes for a waiting request to begin, or to go on."""

    cached: int
    """Tokens that its only sequence finds computed, in the prefix cache. 0 for a request that was swapped out: it
    comes back with what its sequences had computed."""
    blocks: int
    """Free blocks that are taken for that alone."""


class MemoryView(Protocol):
    """What a batcher sees of the KV cache. Asking changes nothing."""

    @property
    def caps(self) -> Caps: ...

    @property
    def free(self) -> int:
        """Blocks that can be taken; those that only the prefix cache keeps are among them."""
        ...

    def start(self, request: RequestView) -> Start:
        """Of a waiting request."""
        ...

    def needed(self, request: RequestView, tokens: Sequence[int], cached: int = 0) -> int:
        """Free blocks that a step takes for a request, copies on write included.

        Args:
            request: running or waiting.
            tokens: to compute, for each of its `sequences`.
            cached: what a `Start` brings first; its own blocks are not counted here.
        """
        ...

    def held(self, request: RequestView) -> int:
        """Different blocks that a request has."""
        ...

    def released(self, requests: Collection[RequestView]) -> int:
        """Blocks that become free when these requests give up all of theirs; what others share stays with them."""
        ...


class Share(NamedTuple):
    """One sequence's part of the next step."""

    sequence: int
    """Of a running request, or of a waiting one, which this starts."""
    tokens: int
    """How many to compute, from 1 to its pending ones and drafts."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """Evict a running request whole: every block of every sample."""

    request: int
    mode: Literal["recompute", "swap"]
    """`recompute` forgets the KV and computes it again later; `swap` copies it to host memory and back."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What happens next: first the preemptions, then one step with these shares."""

    shares: tuple[Share, ...]
    preemptions: tuple[Preemption, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to run now."""

    seconds: float | None
    """Ask again after this long, or None: when something arrives or ends."""


class Batcher(Options):
    """Decides which requests take part in the next step, and with how many tokens."""

    @property
    @abstractmethod
    def max_sequences(self) -> int:
        """Sequences that it keeps alive at once; a session is opened for that many."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether the engine keeps computed blocks of ended requests for others that begin alike."""
        return False

    @property
    def pads_batches(self) -> bool:
        """Whether a batch is a rectangle: rows as wide as the widest, and sequences that ended stay till all have."""
        return False

    def queue_key(self, request: RequestView) -> tuple[float, ...]:
        """Where a request stands in the queue, smallest first. It never changes, and ties go to the older request.

        Because a request's key is fixed, nobody who comes late enough overtakes it: nobody starves.
        """
        return (request.arrived,)

    @abstractmethod
    def plan(
        self, waiting: Collection[RequestView], running: Collection[RequestView], memory: MemoryView, now: float
    ) -> Schedule | Wait:
        """The next step.

        Args:
            waiting: requests that hold no block, smallest `queue_key` first. It can be long: look at its head.
            running: requests that hold blocks, smallest `queue_key` first.
            memory: the KV cache.
            now: seconds.

        Returns:
            A schedule with at least one share, or with preemptions; or how long to wait.
        """


def blocks_in_rectangle(request: RequestView, block_size: int, width: int) -> int:
    """As `blocks_at_most`, in a batch whose prompts are padded to `width` tokens; the padding goes after the prompt."""
    extra = -(-width // block_size) - -(-(request.prompt_tokens + request.max_tokens) // block_size)
    return blocks_at_most(request, block_size) + max(0, extra)


def blocks_at_most(request: RequestView, block_size: int) -> int:
    """Different blocks that a request can come to hold: full blocks of the prompt once, the rest for every sample.

    0 for a model of one step, whose `block_size` is 0.
    """
    if block_size == 0:
        return 0
    shared = request.prompt_tokens // block_size
    each = -(-(request.prompt_tokens + request.max_tokens) // block_size)
    return shared + request.samples * (each - shared)
