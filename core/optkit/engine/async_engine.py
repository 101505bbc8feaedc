"""What every engine with an asynchronous interface is, in this process or in another one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from optkit.engine.outputs import Collector, Completion, Delta
from optkit.engine.request import SamplingParams
from optkit.engine.stats import Stats
from optkit.engine.text import Prompt

__all__ = ["AsyncEngine", "Health", "Stream"]


@dataclass(frozen=True, slots=True)
class Health:
    """How an engine is."""

    state: Literal["starting", "ready", "failed", "closed"]
    """`starting`: requests wait. `failed`: every request is refused."""
    silent: float
    """Seconds that the step under way has taken so far, or since a worker that does not answer was asked."""
    hung: bool
    """Whether that is longer than any step should take. Nothing is done about it: only its owner knows how long a
    step may take."""
    restarts: int
    """How often a worker that died was replaced."""
    reason: str = ""
    """Why it is not ready."""

    @property
    def ok(self) -> bool:
        """Whether requests are served."""
        return self.state == "ready" and not self.hung


class Stream:
    """The deltas of one accepted request, as they come. Iterated, or closed, in the event loop that submitted it.

    Used as an async context manager, it is closed at the end: a request whose reader has left is cancelled.

    Args:
        request: its id, which its deltas have.
        close: called once with the id when nobody reads any more, with whether the request may still be alive.
    """

    def __init__(self, request: int, close: Callable[[int, bool], None]) -> None:
        self.request = request
        self.prompt_tokens = 0
        """Length of its prompt."""
        # Unbounded, and bounded all the same: max_tokens is.
        self._deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        self._close = close
        self._ended = self._closed = False

    def put(self, deltas: Iterable[Delta]) -> None:
        """Hand in what came; for the engine."""
        for delta in deltas:
            self._deltas.put_nowait(delta)

    def close(self) -> None:
        """Stop reading. A request that has not ended is cancelled, and its blocks are free within one step."""
        if not self._closed:
            self._closed = True
            self._close(self.request, not self._ended)
            self._deltas.put_nowait(None)  # for whoever waits in another task

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        delta = None if self._ended or self._closed else await self._deltas.get()
        if delta is None:
            raise StopAsyncIteration
        if delta.last:
            self._ended = True
            self.close()
        return delta

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncEngine(ABC):
    """An artifact of a causal language model that many tasks use at once. Used as an async context manager.

    Every accepted request ends with exactly one delta whose `last` is true, whatever happens to the engine.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the artifact."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Tokens of one sequence, prompt and output together."""

    @abstractmethod
    async def start(self) -> None:
        """Make ready; entering the context does it.

        Raises:
            OptkitError: as `optkit.engine.opened.open_engine`.
        """

    @abstractmethod
    async def close(self) -> None:
        """Cancel what is open, and give back memory. Closing twice does nothing."""

    @abstractmethod
    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt.

        Raises:
            RequestError: the chat template refuses the messages.
        """

    @abstractmethod
    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        salt: str = "",
    ) -> Stream:
        """Start a request. Its deltas come whether they are read or not; close the stream to stop them.

        Args:
            prompt: text, token ids, or chat messages.
            params: how to sample.
            priority: see `optkit.engine.Request`, as for the others.
            timeout: seconds from now, after which it ends with what it has.
            salt: of the prefix cache.

        Raises:
            RequestError: it could never be served.
            MachineError: the engine is closed, has failed, or was not ready within `timeout`.
        """

    @abstractmethod
    def cancel(self, request: int) -> None:
        """End a request within one step; its last delta says so. One that has ended already is left alone."""

    @abstractmethod
    async def stats(self) -> Stats:
        """Counters. A worker that was replaced begins at 0."""

    @abstractmethod
    async def health(self) -> Health:
        """How it is; answers also when nothing else does."""

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        salt: str = "",
    ) -> AsyncIterator[Delta]:
        """Start a request and give its deltas as they come; whoever stops iterating cancels it. Raises as `submit`."""
        async with await self.submit(prompt, params, priority=priority, timeout=timeout, salt=salt) as deltas:
            async for delta in deltas:
                yield delta

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        salt: str = "",
    ) -> Completion:
        """Complete one prompt. One that fails on its way says so in the completion's `error`. Raises as `submit`."""
        params = params or SamplingParams()
        async with await self.submit(prompt, params, priority=priority, timeout=timeout, salt=salt) as deltas:
            collector = Collector(params, deltas.prompt_tokens)
            async for delta in deltas:
                completion = collector.add(delta)
                if completion is not None:
                    return completion
        raise RuntimeError("the stream was closed by another task")

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
