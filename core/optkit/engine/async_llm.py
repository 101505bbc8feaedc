"""The asynchronous API: many tasks share one engine in this process."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from optkit.engine.async_engine import AsyncEngine, Health, Stream
from optkit.engine.opened import OpenedEngine, Speculation, open_engine
from optkit.engine.outputs import Delta
from optkit.engine.request import SamplingParams
from optkit.engine.stats import Stats
from optkit.engine.stepper import Stepper
from optkit.engine.text import Prompt, encode
from optkit.plugins import Plugins

__all__ = ["AsyncLLM"]


class AsyncLLM(AsyncEngine):
    """An artifact of a causal language model, in this process, stepped by a thread of its own.

    ```python
    async with optkit.AsyncLLM("artifacts/quickstart") as llm:
        async for delta in llm.stream("Once upon a time", SamplingParams(max_tokens=32)):
            print(delta.text, end="", flush=True)
    ```

    Several event loops may use one engine; a stream stays with the loop that submitted it.

    Args:
        path: the artifact's directory. It is opened here and now, which takes as long as loading the model.
        plugins: that hold its backend and batching strategy; by default all that are installed.
        speculation: guess several tokens and check them in one step; the output stays the same.
        patience: seconds after which a single step counts as hung, in `health`.

    Raises:
        OptkitError: as `optkit.engine.opened.open_engine`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        plugins: Plugins | None = None,
        speculation: Speculation | None = None,
        patience: float = 60.0,
    ) -> None:
        self._opened: OpenedEngine = open_engine(Path(path), plugins, speculation)
        self._tokenizer = self._opened.engine.tokenizer
        self._patience = patience
        self._streams: dict[int, tuple[AbstractEventLoop, Stream]] = {}
        self._ids = count()
        self._closed = False
        self._stepper = Stepper(self._opened.engine, self._deliver)

    @property
    def name(self) -> str:
        return self._opened.name

    @property
    def max_length(self) -> int:
        return self._opened.max_length

    async def start(self) -> None:
        """It has been open since it was made."""

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._stepper.close)
        self._opened.close()

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        return await asyncio.to_thread(encode, self._tokenizer, prompt)

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        salt: str = "",
    ) -> Stream:
        tokens = await self.encode(prompt)
        request = next(self._ids)
        stream = Stream(request, self._left)
        stream.prompt_tokens = len(tokens)
        self._streams[request] = asyncio.get_running_loop(), stream
        accepted = self._stepper.submit(
            request, tokens, params or SamplingParams(), priority=priority, timeout=timeout, salt=salt
        )
        try:
            await asyncio.wrap_future(accepted)
        except BaseException:
            stream.close()
            raise
        return stream

    def cancel(self, request: int) -> None:
        self._stepper.cancel(request)

    async def stats(self) -> Stats:
        return self._stepper.stats

    async def health(self) -> Health:
        silent, failure = self._stepper.silent, self._stepper.failure
        if self._closed:
            return Health("closed", 0.0, False, 0)
        return Health("ready" if failure is None else "failed", silent, silent > self._patience, 0, failure or "")

    def _left(self, request: int, alive: bool) -> None:
        self._streams.pop(request, None)
        if alive:
            self._stepper.cancel(request)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        """In the stepper's thread: one call for each event loop and step."""
        loops: dict[AbstractEventLoop, list[tuple[Stream, Delta]]] = {}
        for delta in deltas:
            # A reader may leave at any moment.
            known = self._streams.get(delta.request)
            if known is not None:
                loops.setdefault(known[0], []).append((known[1], delta))
        for loop, parts in loops.items():
            try:
                loop.call_soon_threadsafe(_hand_over, parts)
            except RuntimeError:  # the loop was closed, and nobody reads there any more
                for stream, delta in parts:
                    self._left(stream.request, not delta.last)


def _hand_over(parts: list[tuple[Stream, Delta]]) -> None:
    for stream, delta in parts:
        stream.put((delta,))
