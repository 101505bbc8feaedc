"""The engine requests of one HTTP request or batch line: started together, followed, and cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from optkit.engine.async_engine import Stream
from optkit.engine.openai import Body
from optkit.engine.outputs import Collector, Completion, Delta
from optkit.engine.request import FinishReason, SamplingParams
from optkit.engine.text import encode
from optkit.errors import MachineError, OptkitError, RequestError
from optkit.serve.errors import DIED, ApiError, internal, of_request, unavailable
from optkit.serve.guard.keys import Tenant
from optkit.serve.models import Language
from optkit.serve.observing.metrics import Metrics
from optkit.serve.observing.record import Record

__all__ = ["Asker", "Work", "accounted", "started"]


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, and how long an answer is of use."""

    tenant: Tenant
    record: Record
    timeout: float
    """Seconds from now."""
    priority: int = 0
    """See `optkit.engine.Request`."""


class Work:
    """The engine requests of one body, one for each of its prompts. Made by `started`."""

    def __init__(self, model: Language, asker: Asker, metrics: Metrics) -> None:
        self.prompts: list[tuple[int, ...]] = []
        """Token ids of each."""
        self._params: list[SamplingParams] = []
        self._streams: dict[int, Stream] = {}
        self._model, self._record, self._metrics = model, asker.record, metrics
        self._pid = model.engine.pid
        self._latest: dict[tuple[int, int], float] = {}

    async def completions(self) -> list[Completion]:
        """Everything, once it is there.

        Raises:
            ApiError: the model failed, or time ran out.
        """
        collectors = [Collector(one, len(prompt)) for one, prompt in zip(self._params, self.prompts, strict=True)]
        found: dict[int, Completion] = {}
        async with aclosing(self.deltas()) as deltas:
            async for prompt, delta in deltas:
                completion = collectors[prompt].add(delta)
                if completion is not None:
                    found[prompt] = completion
        return [found[prompt] for prompt in range(len(collectors))]

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """What comes, with the place of its prompt, until all prompts have ended.

        Raises:
            ApiError: the model failed, or time ran out; nothing more comes.
        """
        async with aclosing(_merged(self._streams)) as merged:
            async for prompt, delta in merged:
                self._note(prompt, delta)
                if delta.finished in ("error", "cancelled", "deadline"):
                    raise self._failure(delta)
                yield prompt, delta

    def _note(self, prompt: int, delta: Delta) -> None:
        record = self._record
        if delta.tokens:
            now, place = time.monotonic(), (prompt, delta.sample)
            latest = self._latest.get(place)
            self._latest[place] = now
            if latest is not None:
                self._metrics.token_gap(self._model.name, (now - latest) / len(delta.tokens))
            elif record.first_token is None:
                record.first_token = now
                self._metrics.first_token(self._model.name, now - record.started)
            record.output_tokens += len(delta.tokens)
        if delta.prompt is not None:
            record.cached_tokens += delta.prompt.cached
        if delta.finished is not None:
            record.finish_reasons.append(delta.finished)

    def _failure(self, delta: Delta) -> ApiError:
        if delta.finished == "deadline":
            return ApiError(504, "the request took longer than it may", kind="timeout_error", code="timeout")
        if delta.finished == "cancelled":
            return unavailable("the server ended the request; try again")
        self._record.error = delta.error
        if self._model.engine.pid != self._pid:
            return unavailable("the model's process died; try again", DIED)
        return internal()

    async def _start(self, body: Body, asker: Asker, end: float, stack: AsyncExitStack) -> None:
        engine = self._model.engine
        for wish in body.prompts():
            self.prompts.append(await _encoded(self._model, wish))
        self._record.prompt_tokens = sum(len(prompt) for prompt in self.prompts)
        tokenizer = self._model.tokenizer
        self._params = [body.params(len(prompt), engine.max_length, tokenizer) for prompt in self.prompts]

        async def submit(place: int) -> None:
            stream = await engine.submit(
                self.prompts[place],
                self._params[place],
                priority=asker.priority,
                timeout=max(0.0, end - time.monotonic()),
                salt=asker.tenant.salt,
            )
            stack.callback(stream.close)
            self._streams[place] = stream

        # All at once: each is answered between two steps of the engine. All of them, so that none comes too late to be
        # closed.
        submitted = (submit(place) for place in range(len(self.prompts)))
        for outcome in await asyncio.gather(*submitted, return_exceptions=True):
            if outcome is not None:
                raise outcome


@asynccontextmanager
async def started(model: Language, body: Body, asker: Asker, metrics: Metrics) -> AsyncIterator[Work]:
    """Start the engine requests of a body. Those that have not ended at the end of the context are cancelled.

    Raises:
        ApiError: the request can never be served, or it failed.
        Refused: not now: too many wait, or the model's process is not ready.
    """
    end = time.monotonic() + asker.timeout
    with accounted(model.name, asker.record, metrics):
        async with AsyncExitStack() as stack:
            stack.enter_context(model.gate.passing(len(body.prompts())))
            work = Work(model, asker, metrics)
            await work._start(body, asker, end, stack)
            yield work


@contextmanager
def accounted(name: str, record: Record, metrics: Metrics) -> Iterator[None]:
    """Count a request of a model and how it ends, and make its errors ones that a client may see.

    Raises:
        ApiError: in the place of RequestError and of what is the server's own fault.
        Refused: in the place of MachineError: the model's process is not ready.
    """
    record.model, began = name, time.monotonic()
    reason: FinishReason | None = "cancelled"
    try:
        yield
        reason = record.finish_reasons[-1] if record.finish_reasons else "stop"
    except ApiError as error:
        reason = None if error.status < 500 else "deadline" if error.status == 504 else "error"
        if error.status == 429:
            metrics.rejected(name, "queue_full")
        raise
    except RequestError as error:
        reason = None
        raise of_request(error) from error
    except OptkitError as error:
        reason, record.error = "error", str(error)
        ready = not isinstance(error, MachineError)
        raise internal() if ready else unavailable("the model is not ready; try again") from error
    finally:
        if reason is not None:
            seconds = time.monotonic() - began
            metrics.ended(name, seconds, record.prompt_tokens, record.output_tokens, reason)


async def _encoded(model: Language, prompt: Any) -> tuple[int, ...]:
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], int):
        return tuple(prompt)
    return await asyncio.to_thread(encode, model.tokenizer, prompt)


async def _merged(streams: dict[int, Stream]) -> AsyncGenerator[tuple[int, Delta], None]:
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()

    async def pump(place: int, stream: Stream) -> None:
        async for delta in stream:
            arrived.put_nowait((place, delta))
        arrived.put_nowait((place, None))

    tasks = [asyncio.create_task(pump(place, stream)) for place, stream in streams.items()]
    try:
        alive = len(tasks)
        while alive:
            place, brought = await arrived.get()
            if brought is None:
                alive -= 1
            else:
                yield place, brought
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
