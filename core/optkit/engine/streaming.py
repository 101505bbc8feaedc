"""The engine's interface over a runtime that batches by itself: its streams of tokens, event by event."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Collection
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields
from itertools import count

from optkit.backends import EngineRequest, EngineSession, Sampling
from optkit.engine.admission import check_request
from optkit.engine.execution import said
from optkit.engine.following import Followed
from optkit.engine.request import Event, FinishReason, PromptFacts, Request, SamplingParams
from optkit.engine.stats import Stats
from optkit.errors import MachineError, RequestError

__all__ = ["StreamingEngine"]

# What is done here or by whoever turns tokens into text, whatever the runtime can do.
_OURS = frozenset({"max_tokens", "stop", "stop_token_ids", "ignore_eos", "n"})
_SEEDS = 1 << 64

_Place = tuple[int, int]
"""Request and sample."""


@dataclass(frozen=True, slots=True)
class _News:
    """What came of one sample."""

    place: _Place
    token: int | None = None
    finished: FinishReason | None = None
    error: str = ""
    fatal: MachineError | None = None
    """The whole engine failed."""


@dataclass(slots=True)
class _Open:
    """A request that is alive."""

    request: Request
    live: set[int]
    """Samples that have not ended."""
    deadline: float | None
    told: bool = False
    """Whether an event has brought what is known of its prompt."""


class StreamingEngine(Followed):
    """What `Engine` is to a `TokenSession`, to an `EngineSession`: token ids in, events out, in the caller's thread.

    The session runs in an event loop of its own, in a thread. `step` waits for the next token of any request, so that
    a runtime that is silent is seen to be. There is no batcher: the runtime decides who runs, and priorities and the
    salt of a prefix cache mean nothing to it.

    Args:
        session: the open runtime. The engine does not close it, and must be closed before it.
        end_tokens: token ids that end a sequence, unless its request ignores them.
        clock: seconds, for deadlines.
    """

    wait: None = None
    """No batcher waits for company; see `Engine.wait`."""

    def __init__(
        self,
        session: EngineSession,
        *,
        end_tokens: Collection[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session, self._clock = session, clock
        self._end_tokens = frozenset(end_tokens)
        self._requests: dict[int, _Open] = {}
        self._events: list[Event] = []
        self._news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._ids = count()
        self._stats = Stats()
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[_Place, asyncio.Task[None]] = {}  # the loop's alone
        self._thread = threading.Thread(target=self._loop.run_forever, name="optkit-streams", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether any request is alive, or an event was not fetched yet."""
        return bool(self._requests or self._events)

    @property
    def stats(self) -> Stats:
        """Counters; what only the runtime knows, its steps and blocks, stays 0."""
        self._stats.running = sum(one.told for one in self._requests.values())
        self._stats.waiting = len(self._requests) - self._stats.running
        return self._stats

    def add(self, request: Request) -> int:
        """Accept a request and return its id.

        Raises:
            RequestError: it could never be served: too long, empty, unknown tokens, too many samples, or sampled as
                the runtime cannot.
        """
        caps, params = self._session.caps, request.params
        check_request(request, caps, caps.max_batch_size)
        _check_sampling(params, caps.sampling)
        identity = next(self._ids)
        deadline = None if request.timeout is None else self._clock() + request.timeout
        self._requests[identity] = _Open(request, set(range(params.samples)), deadline)
        self._stats.requests += 1
        for sample in range(params.samples):
            asked = _asked(request, sample, self._end_tokens)
            self._loop.call_soon_threadsafe(self._start, (identity, sample), asked)
        return identity

    def cancel(self, request: int) -> None:
        """End a request; the event that says so comes with the next step. One that has ended already is left alone."""
        if request in self._requests:
            self._end(request, "cancelled")

    def stop(self, request: int, sample: int) -> None:
        """End one sample without an event, for a reader who saw a stop string. Others of the request go on."""
        if request in self._requests and sample in self._requests[request].live:
            self._leave(request, sample)

    def step(self) -> list[Event]:
        """Wait for the next token, and return all that happened since the last call.

        Raises:
            MachineError: the runtime failed as a whole; nothing comes of any request any more.
        """
        self._expire()
        if self._requests and not self._events:
            ends = [one.deadline for one in self._requests.values() if one.deadline is not None]
            with suppress(queue.Empty):
                self._take(self._news.get(timeout=max(0.0, min(ends) - self._clock()) if ends else None))
            self._expire()
        with suppress(queue.Empty):
            while True:
                self._take(self._news.get_nowait())
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Close every stream, and end the thread. Closing twice does nothing."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._abandon(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._requests.clear()

    # --- in the event loop's thread

    def _start(self, place: _Place, asked: EngineRequest) -> None:
        task = self._loop.create_task(self._follow(place, asked))
        self._tasks[place] = task
        task.add_done_callback(lambda _: self._tasks.pop(place, None))

    def _forget(self, place: _Place) -> None:
        if place in self._tasks:
            self._tasks[place].cancel()

    async def _follow(self, place: _Place, asked: EngineRequest) -> None:
        left = asked.max_tokens
        try:
            async with aclosing(self._session.submit(asked)) as tokens:
                async for token in tokens:
                    left -= 1
                    finished: FinishReason | None = "length" if left == 0 else None
                    finished = "stop" if token in asked.stop_tokens else finished
                    self._news.put(_News(place, token, finished))
                    if finished is not None:
                        return
            self._news.put(_News(place, finished="error", error="the runtime ended the output early"))
        except MachineError as error:
            self._news.put(_News(place, fatal=error))
        except Exception as error:
            self._news.put(_News(place, finished="error", error=said(error)))

    async def _abandon(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    # --- in the caller's

    def _take(self, news: _News) -> None:
        if news.fatal is not None:
            raise news.fatal
        request, sample = news.place
        one = self._requests.get(request)
        if one is None or sample not in one.live:  # it was cancelled a moment ago
            return
        first = None
        if news.token is not None:
            self._stats.output_tokens += 1
            if not one.told:
                one.told = True
                first = PromptFacts(len(one.request.prompt), 0, None)
                self._stats.prompt_tokens += len(one.request.prompt)
        if news.finished == "error":
            self._end(request, "error", news.error)
            return
        last = False
        if news.finished is not None:
            one.live.remove(sample)
            last = not one.live
            if last:
                del self._requests[request]
        self._events.append(Event(request, sample, news.token, news.finished, last, None, first))

    def _expire(self) -> None:
        now = self._clock()
        for request, one in list(self._requests.items()):
            if one.deadline is not None and one.deadline <= now:
                self._end(request, "deadline")

    def _end(self, request: int, reason: FinishReason, error: str = "") -> None:
        for sample in sorted(self._requests[request].live):
            self._leave(request, sample)
            last = request not in self._requests
            self._events.append(Event(request, sample, None, reason, last, error=error))

    def _leave(self, request: int, sample: int) -> None:
        self._loop.call_soon_threadsafe(self._forget, (request, sample))
        self._requests[request].live.remove(sample)
        if not self._requests[request].live:
            del self._requests[request]


def _check_sampling(params: SamplingParams, honoured: Collection[str]) -> None:
    """Refuse what the runtime would not do.

    Raises:
        RequestError: the first such parameter.
    """
    for name, field in SamplingParams.model_fields.items():
        asked, usual = getattr(params, name), field.get_default(call_default_factory=True)
        # As many as are given back need no choice among them.
        if name in _OURS or name in honoured or asked == usual or (name == "best_of" and asked == params.n):
            continue
        raise RequestError(
            f"this model's runtime, which batches by itself, does not do {name}",
            found=asked,
            remedy="leave it out, or serve the model with another backend",
        )


def _asked(request: Request, sample: int, end_tokens: frozenset[int]) -> EngineRequest:
    params = request.params
    chosen = {field.name: getattr(params, field.name) for field in fields(Sampling)}
    if params.seed is not None:
        chosen["seed"] = (params.seed + sample) % _SEEDS
    ends = frozenset() if params.ignore_eos else end_tokens
    return EngineRequest(request.prompt, params.max_tokens, ends | set(params.stop_token_ids), Sampling(**chosen))
