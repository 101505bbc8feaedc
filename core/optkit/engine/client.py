"""The engine in a process of its own: whatever kills it, its client goes on, and starts another one."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from optkit.engine import wire
from optkit.engine.async_engine import AsyncEngine, Health, Stream
from optkit.engine.connection import Connection
from optkit.engine.ledger import Ledger
from optkit.engine.opened import Speculation
from optkit.engine.request import FinishReason, SamplingParams
from optkit.engine.stats import Stats
from optkit.engine.text import Prompt
from optkit.errors import MachineError, OptkitError, RequestError
from optkit.plugins import Plugins

__all__ = ["WorkerEngine"]

_log = logging.getLogger(__name__)

_SETTLED_SECONDS = 30.0
"""A worker that was ready for this long died of something new."""
_PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Seconds before a new worker is started, by how many died quickly in a row; then it is given up."""
_ANSWER_SECONDS = 2.0
"""What `health` waits for an answer."""


class WorkerEngine(AsyncEngine):
    """An artifact of a causal language model, in a process of its own; everything happens in one event loop.

    When the process dies, every open request ends with an error, at once; a new process is started, and requests wait
    for it. One that dies again and again, each time soon after it opened the artifact, is given up.

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
        self._opening = ("open", str(path), [] if plugins is None else plugins.blocked, wish)
        self._patience = patience
        self._name, self._max_length = "", 0
        self._ids = count()
        self._streams: dict[int, Stream] = {}
        self._ledger = Ledger()
        self._accepting: dict[int, asyncio.Future[int]] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._restarts = 0
        self._asked: float | None = None
        self._opened_at: float | None = None
        self._closed = False
        self._reason = "the worker process was not started"
        self._connection: Connection | None = None
        self._open: Connection | None = None
        """The same, while its artifact is open."""
        self._supervision: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        return self._connection.pid if self._connection is not None and self._connection.alive else None

    async def start(self) -> None:
        """Start the process and wait until the artifact is open.

        Raises:
            OptkitError: as `optkit.engine.opened.open_engine` in that process.
            MachineError: the process died on its way.
        """
        if self._supervision is None:
            self._ready = asyncio.get_running_loop().create_future()
            self._supervision = asyncio.create_task(self._supervise())
        await self._wait_ready(None)

    async def close(self) -> None:
        self._closed = True
        if self._supervision is None:
            return
        if self._connection is not None and self._connection.alive:
            if self._open is not None:
                self._open.hang_up()
            else:  # it opens a model and listens to nobody
                self._connection.kill()
            await asyncio.wait({self._supervision})
        self._supervision.cancel()
        with suppress(asyncio.CancelledError):
            await self._supervision
        self._bury(MachineError("the engine is closed"), "cancelled")
        self._give_up(MachineError("the engine is closed"))

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        await self._wait_ready(None)
        return tuple(await self._ask("encode", prompt))

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
        except _Lost:
            # Nothing came of it, so it can have another process; only one, as it may be what kills them.
            return await self._hand_over(prompt, params, priority, end, salt)

    def cancel(self, request: int) -> None:
        if request in self._ledger and self._open is not None:
            self._open.send(_frame("cancel", request))

    async def stats(self) -> Stats:
        await self._wait_ready(None)
        counters, _, _ = await self._ask("status")
        return Stats(**counters)

    async def health(self) -> Health:
        if self._closed:
            return Health("closed", 0.0, False, self._restarts)
        if self._supervision is None or self._ready is None or not self._ready.done():
            return Health("starting", 0.0, False, self._restarts, self._reason)
        if self._ready.exception() is not None:
            return Health("failed", 0.0, False, self._restarts, self._reason)
        asked = time.monotonic()
        try:
            _, silent, failure = await asyncio.wait_for(self._ask("status"), _ANSWER_SECONDS)
        except TimeoutError:
            # Even a thread that only answers is stuck: since the first question that was left open.
            self._asked = asked if self._asked is None else self._asked
            silent, failure = time.monotonic() - self._asked, None
        except OptkitError as error:  # it died just now
            return Health("starting", 0.0, False, self._restarts, str(error))
        else:
            self._asked = None
        return Health(
            "ready" if failure is None else "failed", silent, silent > self._patience, self._restarts, failure or ""
        )

    # --- one process after the other

    async def _supervise(self) -> None:
        deaths = 0
        while True:
            error = await self._life()
            lived = 0.0 if self._opened_at is None else time.monotonic() - self._opened_at
            deaths = 1 if lived > _SETTLED_SECONDS else deaths + 1
            if self._closed:
                return
            self._bury(error, "error")
            if self._opened_at is None and not self._restarts:
                self._give_up(error)
                return
            if deaths > len(_PAUSES):
                self._give_up(MachineError(f"{deaths} worker processes died in a row, the last one: {error}"))
                return
            await asyncio.sleep(_PAUSES[deaths - 1])
            self._restarts += 1

    async def _life(self) -> OptkitError:
        """Of one process, and what it died of."""
        self._opened_at = None
        try:
            connection = self._connection = await Connection.start()
            try:
                connection.send(_frame(*self._opening))
                while (message := await connection.receive()) is not None:
                    self._take(connection, *message)
            finally:
                self._lose()
                await connection.end()
            return MachineError(connection.death)
        except OptkitError as error:
            return error
        except OSError as error:
            return MachineError(f"the worker process cannot be started ({error.strerror})")
        except Exception as error:
            _log.exception("the worker process cannot be talked to")
            return OptkitError(f"the worker process cannot be talked to ({type(error).__name__}: {error})")

    def _take(self, connection: Connection, kind: str, *fields: Any) -> None:
        match kind, fields:
            case "deltas", (packed,):
                for delta in wire.unpack_deltas(packed):
                    self._ledger.note(delta)
                    if delta.request in self._streams:
                        self._streams[delta.request].put((delta,))
            case "accepted", (request, tokens):
                _settle(self._accepting.get(request), tokens)
            case "refused", (request, error):
                self._ledger.leave(request)
                _settle(self._accepting.get(request), wire.unpack_error(error))
            case "answer", (question, answer):
                _settle(self._questions.get(question), answer)
            case "unanswered", (question, error):
                _settle(self._questions.get(question), wire.unpack_error(error))
            case "ready", (name, max_length):
                self._name, self._max_length = name, max_length
                self._open, self._asked, self._opened_at = connection, None, time.monotonic()
                _settle(self._ready, None)
            case "broken", (error,):
                raise wire.unpack_error(error)

    def _lose(self) -> None:
        self._open = None
        if self._opened_at is not None:  # from now on requests wait for the next one
            self._ready = asyncio.get_running_loop().create_future()

    def _bury(self, error: OptkitError, reason: FinishReason) -> None:
        """Tell everybody who waits for this process that nothing will come."""
        self._reason = str(error)
        for waiting in (*self._accepting.values(), *self._questions.values()):
            _settle(waiting, error if self._closed else _Lost(str(error)))
        for request in self._accepting:
            self._ledger.leave(request)
        for delta in self._ledger.end(reason, str(error)):
            if delta.request in self._streams:
                self._streams[delta.request].put((delta,))

    def _give_up(self, error: OptkitError) -> None:
        self._reason = str(error)
        if self._ready is None or self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()
        self._ready.set_exception(error)
        self._ready.exception()  # whether anybody asks or not

    # --- one request after the other

    async def _wait_ready(self, end: float | None) -> None:
        if self._closed or self._ready is None:
            raise MachineError("the engine is closed" if self._closed else self._reason)
        try:
            async with asyncio.timeout(None if end is None else end - time.monotonic()):
                await asyncio.shield(self._ready)
        except TimeoutError:
            raise MachineError(f"no worker process was ready in time ({self._reason})") from None

    async def _hand_over(
        self, prompt: Prompt, params: SamplingParams, priority: int, end: float | None, salt: str
    ) -> Stream:
        await self._wait_ready(end)
        request = next(self._ids)
        left = None if end is None else max(0.0, end - time.monotonic())
        frame = _frame("submit", request, prompt, params, priority, left, salt)
        stream = self._streams[request] = Stream(request, self._left)
        accepted = self._accepting[request] = asyncio.get_running_loop().create_future()
        self._ledger.enter(request, params.samples)
        try:
            self._send(frame)
            stream.prompt_tokens = await accepted
        except BaseException as error:
            if isinstance(error, OptkitError):
                self._ledger.leave(request)
            stream.close()
            raise
        finally:
            del self._accepting[request]
        return stream

    async def _ask(self, kind: str, *fields: Any) -> Any:
        question = next(self._ids)
        answer = self._questions[question] = asyncio.get_running_loop().create_future()
        try:
            self._send(_frame(kind, question, *fields))
            return await answer
        finally:
            del self._questions[question]

    def _send(self, frame: bytes) -> None:
        if self._open is None:
            raise _Lost(self._reason)
        self._open.send(frame)

    def _left(self, request: int, alive: bool) -> None:
        self._streams.pop(request, None)
        if alive:
            self.cancel(request)


class _Lost(MachineError):
    """The process died over something that it had not begun."""


def _frame(*message: Any) -> bytes:
    try:
        return wire.pack(*(one.model_dump_json() if isinstance(one, SamplingParams) else one for one in message))
    except ValueError as error:
        raise RequestError(f"the request cannot be sent ({error})") from error


def _settle(waiting: asyncio.Future[Any] | None, outcome: Any) -> None:
    if waiting is None or waiting.done():
        return
    if isinstance(outcome, BaseException):
        waiting.set_exception(outcome)
    else:
        waiting.set_result(outcome)
