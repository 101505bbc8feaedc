"""One worker process after the other, and what is asked of them: what every client of a worker shares."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

from optkit.engine import wire
from optkit.engine.async_engine import Health
from optkit.engine.connection import Connection
from optkit.errors import MachineError, OptkitError, RequestError

__all__ = ["Lost", "Supervision", "frame", "settle"]

_log = logging.getLogger(__name__)

_SETTLED_SECONDS = 30.0
"""A worker that was ready for this long died of something new."""
_PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Seconds before a new worker is started, by how many died quickly in a row."""
_LONG_PAUSE = 30.0
"""After as many deaths as there are pauses. Until another worker is ready requests are refused and do not wait."""
_ANSWER_SECONDS = 2.0
"""What `health` waits for an answer."""


def _nothing(*_: object) -> None:
    """For a client to whom answers to its questions are all that comes."""


class Lost(MachineError):
    """The process died over something that it had not begun."""


class Supervision:
    """Keeps a worker process with an open artifact, and asks it; everything happens in one event loop.

    When the process dies, a new one is started, and `ready` waits for it. When one after the other dies soon after it
    opened the artifact, requests are refused until one is ready that was started after a longer pause.

    Args:
        opening: the first message to each process.
        patience: seconds after which a single step counts as hung, in `health`. Opening a model is no step.
        opened: called with what each process says of the artifact that it opened.
        take: called with every message that answers no question.
        lost: called when nothing more will come from a process: with `Lost`, or, as it was closed, with MachineError.
    """

    def __init__(
        self,
        opening: tuple[Any, ...],
        patience: float,
        *,
        opened: Callable[..., None],
        take: Callable[..., None] = _nothing,
        lost: Callable[[MachineError], None] = _nothing,
    ) -> None:
        self._opening, self._patience = opening, patience
        self._opened, self._take, self._lost = opened, take, lost
        self._ids = count()
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._begun: set[int] = set()
        self._restarts = 0
        self._asked: float | None = None
        self._opened_at: float | None = None
        self._closed = False
        self._reason = "the worker process was not started"
        self._connection: Connection | None = None
        self._open: Connection | None = None
        """The same, while its artifact is open."""
        self._supervising: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        return self._connection.pid if self._connection is not None and self._connection.alive else None

    async def start(self) -> None:
        """Start the process and wait until the artifact is open.

        Raises:
            OptkitError: that opening met in that process.
            MachineError: the process died on its way.
        """
        if self._supervising is None:
            self._ready = asyncio.get_running_loop().create_future()
            self._supervising = asyncio.create_task(self._supervise())
        await self.ready(None)

    async def close(self) -> None:
        """End the process. Closing twice does nothing."""
        self._closed = True
        if self._supervising is None:
            return
        if self._connection is not None and self._connection.alive:
            if self._open is not None:
                self._open.hang_up()
            else:  # it opens a model and listens to nobody
                self._connection.kill()
            await asyncio.wait({self._supervising})
        self._supervising.cancel()
        with suppress(asyncio.CancelledError):
            await self._supervising
        self._bury(MachineError("the engine is closed"))
        self._give_up(MachineError("the engine is closed"))

    async def ready(self, end: float | None) -> None:
        """Wait until a process has the artifact open.

        Args:
            end: on the monotonic clock, or None: as long as it takes.

        Raises:
            MachineError: closed, not ready by then, or processes die one after the other.
            OptkitError: that opening met.
        """
        if self._closed or self._ready is None:
            raise MachineError("the engine is closed" if self._closed else self._reason)
        try:
            async with asyncio.timeout(None if end is None else end - time.monotonic()):
                await asyncio.shield(self._ready)
        except TimeoutError:
            raise MachineError(f"no worker process was ready in time ({self._reason})") from None

    async def ask(self, kind: str, *fields: Any, cancelled: str | None = None) -> Any:
        """The answer to a question.

        Args:
            kind: of the question's message, whose next field is the question's number.
            fields: the others.
            cancelled: kind of the message that tells the process to forget the question, when nobody waits any more.

        Raises:
            OptkitError: that it is answered with.
            RequestError: it is too large.
            MachineError: the process died over it; `Lost` if it had not begun.
        """
        question = next(self._ids)
        message = frame(kind, question, *fields)
        answer = self._questions[question] = asyncio.get_running_loop().create_future()
        try:
            self.send(message)
            return await answer
        except asyncio.CancelledError:
            if cancelled is not None:
                self.tell(frame(cancelled, question))
            raise
        finally:
            del self._questions[question]
            self._begun.discard(question)

    def send(self, message: bytes) -> None:
        """Send a message to the process that is ready.

        Raises:
            Lost: none is.
        """
        if self._open is None:
            raise Lost(self._reason)
        self._open.send(message)

    def tell(self, message: bytes) -> None:
        """Send what a new process need not know, so that nothing is lost where none is ready."""
        if self._open is not None:
            self._open.send(message)

    async def health(self) -> Health:
        """How the process is; answers also when nothing else does."""
        if self._closed:
            return Health("closed", 0.0, False, self._restarts)
        if self._supervising is None or self._ready is None or not self._ready.done():
            return Health("starting", 0.0, False, self._restarts, self._reason)
        if self._ready.exception() is not None:
            return Health("failed", 0.0, False, self._restarts, self._reason)
        asked = time.monotonic()
        try:
            _, silent, failure = await asyncio.wait_for(self.ask("status"), _ANSWER_SECONDS)
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
            self._bury(error)
            if self._opened_at is None and not self._restarts:
                self._give_up(error)
                return
            if deaths > len(_PAUSES):
                self._give_up(MachineError(f"{deaths} worker processes died in a row, the last one: {error}"))
            await asyncio.sleep(_PAUSES[deaths - 1] if deaths <= len(_PAUSES) else _LONG_PAUSE)
            self._restarts += 1

    async def _life(self) -> OptkitError:
        """Of one process, and what it died of."""
        self._opened_at = None
        try:
            connection = self._connection = await Connection.start()
            try:
                connection.send(frame(*self._opening))
                while (message := await connection.receive()) is not None:
                    self._hear(connection, *message)
            finally:
                self._open = None
                if self._opened_at is not None:  # from now on requests wait for the next one
                    self._ready = asyncio.get_running_loop().create_future()
                await connection.end()
            return MachineError(connection.death)
        except OptkitError as error:
            return error
        except OSError as error:
            return MachineError(f"the worker process cannot be started ({error.strerror})")
        except Exception as error:
            _log.exception("the worker process cannot be talked to")
            return OptkitError(f"the worker process cannot be talked to ({type(error).__name__}: {error})")

    def _hear(self, connection: Connection, kind: str, *fields: Any) -> None:
        match kind, fields:
            case "begun", (question,) if question in self._questions:
                self._begun.add(question)
            case "answer", (question, answer):
                settle(self._questions.get(question), answer)
            case "unanswered", (question, error):
                settle(self._questions.get(question), wire.unpack_error(error))
            case "ready", facts:
                self._opened(*facts)
                self._open, self._asked, self._opened_at = connection, None, time.monotonic()
                if self._ready is None or self._ready.done():
                    self._ready = asyncio.get_running_loop().create_future()
                self._ready.set_result(None)
            case "broken", (error,):
                raise wire.unpack_error(error)
            case _:
                self._take(kind, *fields)

    def _bury(self, error: OptkitError) -> None:
        """Tell everybody who waits for this process that nothing will come."""
        self._reason = str(error)
        dead = MachineError(str(error))
        lost = dead if self._closed else Lost(str(error))
        for question, waiting in self._questions.items():
            settle(waiting, dead if question in self._begun else lost)
        self._lost(lost)

    def _give_up(self, error: OptkitError) -> None:
        self._reason = str(error)
        if self._ready is None or self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()
        self._ready.set_exception(error)
        self._ready.exception()  # whether anybody asks or not


def frame(*message: Any) -> bytes:
    """A message to a worker.

    Raises:
        RequestError: it is too large, or holds what cannot be sent.
    """
    try:
        return wire.pack(*message)
    except ValueError as error:
        raise RequestError(f"the request cannot be sent ({error})") from error


def settle(waiting: asyncio.Future[Any] | None, outcome: Any) -> None:
    """Give whoever still waits a result, or an exception."""
    if waiting is None or waiting.done():
        return
    if isinstance(outcome, BaseException):
        waiting.set_exception(outcome)
    else:
        waiting.set_result(outcome)
