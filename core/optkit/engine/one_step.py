"""What the engines of models of one step share: requests wait, a batch of them is computed in one call, all end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, Literal, TypeVar

from sortedcontainers import SortedKeyList

from optkit.batching import Batcher, RequestView, Schedule, Start
from optkit.errors import MachineError, OptkitError, RecipeError
from optkit.steps import Caps, Limits

__all__ = ["OneStepEngine", "Outcome", "TensorStats", "run_all"]

Payload = TypeVar("Payload")
Result = TypeVar("Result")
Finished = TypeVar("Finished")

_BOUNDLESS = 1 << 62
_LONG_AGO = 1e9
"""Seconds, longer than any strategy waits for company."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Result]):
    """The end of one request."""

    request: int
    finished: Literal["done", "cancelled", "error"]
    result: Result | None = None
    """When `finished` is `done`; arrays are views into those of the batch."""
    error: str = ""
    """What went wrong, when `finished` is `error`."""


@dataclass(slots=True)
class TensorStats:
    """What an engine has done since it was made, and who waits."""

    steps: int = 0
    """Calls of the model that did not raise."""
    requests: int = 0
    """Accepted."""
    rows: int = 0
    """Computed; a sequence is one row."""
    tokens: int = 0
    """Of sequences, computed without padding."""
    padding: int = 0
    """Tokens computed only because the sequences of a batch differ in length."""
    waiting: int = 0
    """Requests."""


class OneStepEngine(ABC, Generic[Payload, Result]):
    """Drives one session with one batcher. One thread calls it at a time.

    A schedule is one call of the model, which ends its requests. When the call raises, the batch is run again in
    halves, so that only the request that cannot be computed fails. Requests of different shapes stand in queues of
    their own, of which the batcher sees one at a time; the one with the oldest request comes first.

    Args:
        batcher: decides who shares a batch.
        limits: that the session was opened for.
        vocab_size: of the model, 0 if it has no tokens.
        clock: seconds, for the batcher.
        streams: calls of the model at the same time. More than one have threads of their own.
    """

    def __init__(
        self,
        batcher: Batcher,
        limits: Limits,
        vocab_size: int = 0,
        clock: Callable[[], float] = time.monotonic,
        streams: int = 1,
    ) -> None:
        self.stats = TensorStats()
        self.wait: float | None = None
        """Seconds after which `step` should be called again, when the batcher waits for company; None: no such time."""
        self._batcher, self._clock = batcher, clock
        rows = min(limits.max_batch_size, batcher.max_sequences)
        self._memory = _NoMemory(Caps("none", 0, 0, rows, True, vocab_size, limits.max_length))
        self._ids = count()
        self._alive: dict[int, _Request[Payload]] = {}
        self._queues: dict[Hashable, Any] = {}
        self._ended: list[Outcome[Result]] = []
        self._streams, self._threads = streams, ThreadPoolExecutor(streams) if streams > 1 else None
        self._running: set[Future[list[_Call[Payload, Result]]]] = set()

    @property
    def busy(self) -> bool:
        """Whether any request is alive, or an end was not fetched yet."""
        return bool(self._alive or self._ended)

    def cancel(self, request: int) -> None:
        """End a request; what says so comes with the next step. One that has ended already is left alone."""
        if request in self._alive:
            self._end(self._alive[request], Outcome(request, "cancelled"))

    def step(self) -> list[Outcome[Result]]:
        """Run one batch, if the batcher wants one, and return the requests that ended since the last call.

        With several streams it has as many batches run as can, and waits for one of them.

        Raises:
            RecipeError: the strategy cuts what a model of one step needs whole.
        """
        self.wait = None
        if self._threads is None:
            batch = self._next_batch()
            if batch:
                self._settle(self._calls(batch))
        else:
            # One more than can run, so that no thread waits until the caller is done with what ended.
            while len(self._running) <= self._streams and (batch := self._next_batch()):
                for request in batch:
                    self._leave(request)
                self._running.add(self._threads.submit(self._calls, batch))
            done, self._running = wait_for(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                self._settle(future.result())
            if self._running:
                self.wait = None  # the next step waits for those
        ended, self._ended = self._ended, []
        return ended

    def check_strategy(self, tokens: int) -> None:
        """Refuse a batcher that cannot run a request of so many tokens, before one comes.

        Raises:
            RecipeError: it would cut it.
        """
        longest: _Request[Any] = _Request(0, None, tokens, 1, (), 0, self._clock())
        plan = self._batcher.plan([longest], (), self._memory, longest.arrived + _LONG_AGO)
        if isinstance(plan, Schedule):
            self._batch(plan, {0: longest})

    @abstractmethod
    def add(self, payload: Payload) -> int:
        """Accept a request and return its id.

        Raises:
            RequestError: it is not what the model takes.
        """

    @abstractmethod
    def _compute(self, batch: Sequence[Payload]) -> Sequence[Result]:
        """One call of the model: the results of at least one request, which belong to one queue.

        Several threads may be in it, so it changes nothing.
        """

    def _outcome(self, request: int, result: Result) -> Outcome[Result]:
        """What becomes of a result, likewise in any thread."""
        return Outcome(request, "done", result)

    def _count(self, batch: Sequence[Payload]) -> None:
        """Note in `stats` what a call computed."""

    def _accept(
        self, payload: Payload, *, tokens: int = 1, rows: int = 1, queue: Hashable = (), priority: int = 0
    ) -> int:
        """Put a request into a queue.

        Args:
            payload: for `_compute`.
            tokens: what the batcher takes for its length.
            rows: of the batch.
            queue: whose requests may share a call.
            priority: lower comes first.
        """
        request = _Request(next(self._ids), payload, tokens, rows, queue, priority, self._clock())
        request.key = self._batcher.queue_key(request)
        self._alive[request.id] = request
        if queue not in self._queues:
            self._queues[queue] = SortedKeyList(key=_place)
        self._queues[queue].add(request)
        self.stats.requests += 1
        self.stats.waiting = len(self._alive)
        return request.id

    @property
    def _strategy(self) -> str:
        return type(self._batcher).__name__

    def _batch(self, plan: Schedule, alive: Mapping[int, _Request[Payload]]) -> list[_Request[Payload]]:
        """The requests that get all their tokens. One that would be cut in chunks stays in the queue: it has no KV."""
        shares = [(alive[share.sequence], share.tokens) for share in plan.shares]
        batch = [request for request, tokens in shares if tokens >= request.pending]
        rows = sum(request.samples for request in batch)
        if not batch or rows > self._memory.caps.max_batch_size:
            given = f"{shares[0][1]} of {shares[0][0].pending} tokens" if shares else "nothing"
            raise RecipeError(
                f"{self._strategy} gives a model of one step {given if not batch else f'{rows} rows'} to compute",
                remedy="raise its limit of tokens to max_length, or choose another batching strategy",
            )
        return batch

    def _next_batch(self) -> list[_Request[Payload]] | None:
        """What the batcher wants to run now; None where it waits, and then `wait` says how long."""
        waits: list[float] = []
        for queue in sorted(self._queues.values(), key=lambda queue: _place(queue[0])):
            plan = self._batcher.plan(queue, (), self._memory, self._clock())
            if isinstance(plan, Schedule):
                return self._batch(plan, self._alive)
            if plan.seconds is not None:
                waits.append(plan.seconds)
        if self._queues and not (waits or self._ended or self._running):
            raise OptkitError(f"{self._strategy} waits for ever with {len(self._alive)} requests waiting")
        self.wait = min(waits, default=None)
        return None

    def _calls(self, batch: Sequence[_Request[Payload]]) -> list[_Call[Payload, Result]]:
        """A batch in one call of the model, or in halves where that raises. It leaves the engine as it is."""
        try:
            results = self._compute([request.payload for request in batch])
        except Exception as error:
            if len(batch) == 1:
                ended: Outcome[Result] = Outcome(batch[0].id, "error", error=f"{type(error).__name__}: {error}")
                return [_Call(batch, [ended], raised=True)]
            half = len(batch) // 2
            return [*self._calls(batch[:half]), *self._calls(batch[half:])]
        return [_Call(batch, [self._outcome(one.id, found) for one, found in zip(batch, results, strict=True)])]

    def _settle(self, calls: Sequence[_Call[Payload, Result]]) -> None:
        for call in calls:
            if not call.raised:
                self.stats.steps += 1
                self.stats.rows += sum(request.samples for request in call.batch)
                self._count([request.payload for request in call.batch])
            for request, outcome in zip(call.batch, call.outcomes, strict=True):
                if request.id in self._alive:  # otherwise it was cancelled while it ran
                    self._end(request, outcome)

    def _end(self, request: _Request[Payload], outcome: Outcome[Result]) -> None:
        del self._alive[request.id]
        if request.queued:
            self._leave(request)
        self._ended.append(outcome)
        self.stats.waiting = len(self._alive)

    def _leave(self, request: _Request[Payload]) -> None:
        request.queued = False
        self._queues[request.queue].remove(request)
        if not self._queues[request.queue]:
            del self._queues[request.queue]


def run_all(
    engine: OneStepEngine[Payload, Result],
    payloads: Sequence[Payload],
    noun: str,
    finish: Callable[[Result], Finished],
    told: Callable[[int], object] | None = None,
) -> list[Finished]:
    """Run requests through an engine that does nothing else meanwhile.

    Args:
        engine: that has no request.
        payloads: for `add`.
        noun: what one is called, for errors.
        finish: makes of each result what is kept: arrays are views into those of a batch.
        told: called with the number of new results after each step.

    Returns:
        One for each payload, in their order.

    Raises:
        MachineError: the model failed on a request, which is named; nothing goes on.
    """
    places: dict[int, int] = {}
    found: dict[int, Finished] = {}
    try:
        for index, payload in enumerate(payloads):
            places[engine.add(payload)] = index
        while places:
            ended = engine.step()
            for outcome in ended:
                index = places.pop(outcome.request)
                if outcome.result is None:
                    raise MachineError(f"the model failed ({outcome.error})", where=f"{noun} {index}")
                found[index] = finish(outcome.result)
            if told is not None:
                told(len(ended))
            if engine.wait:
                time.sleep(engine.wait)
    finally:
        for request in places:  # also after Ctrl-C
            engine.cancel(request)
        if engine.busy:
            engine.step()
    return [found[index] for index in range(len(payloads))]


class _Request(Generic[Payload]):
    """A request and its only sequence: implements `RequestView` and `SequenceView`."""

    computed = drafts = max_tokens = 0
    queued = True

    def __init__(
        self, identity: int, payload: Payload, tokens: int, rows: int, queue: Hashable, priority: int, arrived: float
    ) -> None:
        self.id, self.payload, self.queue, self.priority, self.arrived = identity, payload, queue, priority, arrived
        self.prompt_tokens = self.pending = tokens
        self.samples = rows
        self.key: tuple[float, ...] = ()

    @property
    def sequences(self) -> tuple[_Request[Payload]]:
        return (self,)


@dataclass(frozen=True, slots=True)
class _Call(Generic[Payload, Result]):
    """A call of the model that has ended."""

    batch: Sequence[_Request[Payload]]
    outcomes: Sequence[Outcome[Result]]
    """Of each of them."""
    raised: bool = False


class _NoMemory:
    """Nothing is kept between steps, so nothing is ever short. Implements `MemoryView`."""

    free = _BOUNDLESS

    def __init__(self, caps: Caps) -> None:
        self.caps = caps

    def start(self, request: RequestView) -> Start:
        return Start(0, 0)

    def needed(self, request: RequestView, tokens: Sequence[int], cached: int = 0) -> int:
        return 0

    def held(self, request: RequestView) -> int:
        return 0

    def released(self, requests: Collection[RequestView]) -> int:
        return 0


def _place(request: _Request[Any]) -> tuple[tuple[float, ...], int]:
    return request.key, request.id
