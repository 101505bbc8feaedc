"""A causal language model in a process of its own: whatever kills it, its client goes on, and starts another one."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from pathlib import Path
from typing import Any

from optkit.engine import wire
from optkit.engine.async_engine import AsyncEngine, Health, Stream
from optkit.engine.ledger import Ledger
from optkit.engine.opened import Speculation
from optkit.engine.request import SamplingParams
from optkit.engine.stats import Stats
from optkit.engine.supervision import Lost, Supervision, frame, settle
from optkit.engine.text import Prompt
from optkit.errors import MachineError, OptkitError
from optkit.plugins import Plugins

__all__ = ["WorkerEngine"]


class WorkerEngine(AsyncEngine):
    """An artifact of a causal language model, in a process of its own; everything happens in one event loop.

    When the process dies, every open request ends with an error, at once; a new process is started, and requests wait
    for it. While one after the other dies soon after it opened the artifact, requests are refused.

    ```python
    async with WorkerEngine("artifacts/quickstart") as engine:
        completion = await engine.generate("Once upon a time", SamplingParams(max_tokens=32))
    ```

    Args:
        path: the artifact's directory. `start` opens it.
        plugins: the process leaves out those that these leave out; it finds installed plugins only.
        speculation: guess several tokens and check them in one step; the output stays the same.
        patience: seconds after which a single step counts as hung, in `health`. Opening a model is no step.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        plugins: Plugins | None = None,
        speculation: Speculation | None = None,
        patience: float = 60.0,
    ) -> None:
        wish = None if speculation is None else speculation.model_dump()
        opening = ("open", str(path), [] if plugins is None else plugins.blocked, wish)
        self._worker = Supervision(opening, patience, opened=self._opened, take=self._take, lost=self._lost)
        self._name, self._max_length = "", 0
        self._ids = count()
        self._streams: dict[int, Stream] = {}
        self._ledger = Ledger()
        self._accepting: dict[int, asyncio.Future[int]] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        return self._worker.pid

    async def start(self) -> None:
        """Start the process and wait until the artifact is open.

        Raises:
            OptkitError: as `optkit.engine.opened.open_engine` in that process.
            MachineError: the process died on its way.
        """
        await self._worker.start()

    async def close(self) -> None:
        await self._worker.close()

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        await self._worker.ready(None)
        return tuple(await self._worker.ask("encode", prompt))

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        salt: str = "",
    ) -> Stream:
        params = params or SamplingParams()
        end = None if timeout is None else time.monotonic() + timeout
        try:
            return await self._hand_over(prompt, params, priority, end, salt)
        except Lost:
            # Nothing came of it, so it can have another process; only one, as it may be what kills them.
            return await self._hand_over(prompt, params, priority, end, salt)

    def cancel(self, request: int) -> None:
        if request in self._ledger:
            self._worker.tell(frame("cancel", request))

    async def stats(self) -> Stats:
        await self._worker.ready(None)
        counters, _, _ = await self._worker.ask("status")
        return Stats(**counters)

    async def health(self) -> Health:
        return await self._worker.health()

    def _opened(self, name: str, max_length: int) -> None:
        self._name, self._max_length = name, max_length

    def _take(self, kind: str, *fields: Any) -> None:
        match kind, fields:
            case "deltas", (packed,):
                for delta in wire.unpack_deltas(packed):
                    self._ledger.note(delta)
                    if delta.request in self._streams:
                        self._streams[delta.request].put((delta,))
            case "accepted", (request, tokens):
                settle(self._accepting.get(request), tokens)
            case "refused", (request, error):
                self._ledger.leave(request)
                settle(self._accepting.get(request), wire.unpack_error(error))

    def _lost(self, error: MachineError) -> None:
        for request, waiting in self._accepting.items():
            settle(waiting, error)
            self._ledger.leave(request)
        for delta in self._ledger.end("error" if isinstance(error, Lost) else "cancelled", str(error)):
            if delta.request in self._streams:
                self._streams[delta.request].put((delta,))

    async def _hand_over(
        self, prompt: Prompt, params: SamplingParams, priority: int, end: float | None, salt: str
    ) -> Stream:
        await self._worker.ready(end)
        request = next(self._ids)
        left = None if end is None else max(0.0, end - time.monotonic())
        message = frame("submit", request, prompt, params.model_dump_json(), priority, left, salt)
        stream = self._streams[request] = Stream(request, self._left)
        accepted = self._accepting[request] = asyncio.get_running_loop().create_future()
        self._ledger.enter(request, params.samples)
        try:
            self._worker.send(message)
            stream.prompt_tokens = await accepted
        except BaseException as error:
            if isinstance(error, OptkitError):
                self._ledger.leave(request)
            stream.close()
            raise
        finally:
            del self._accepting[request]
        return stream

    def _left(self, request: int, alive: bool) -> None:
        self._streams.pop(request, None)
        if alive:
            self.cancel(request)
