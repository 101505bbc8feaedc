"""Works through the queue: checks inputs, has lines answered, and puts the answers into files.

Every state that a batch can be in is one that this can begin from, so that a start after `kill -9` is like any other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, Protocol

from optkit.errors import MachineError, OptkitError
from optkit.serve.batches.checking import Checked, parse
from optkit.serve.batches.commits import Commits
from optkit.serve.batches.files import Writer
from optkit.serve.batches.objects import Line, Work, answer_line, expired_line
from optkit.serve.batches.quota import Quota
from optkit.serve.batches.seats import Seat, Seats, Window
from optkit.serve.batches.store import Store
from optkit.serve.batches.threads import Threads
from optkit.serve.errors import DIED, ApiError, Refused, internal
from optkit.serve.guard.keys import Tenant
from optkit.serve.observing.record import Record

__all__ = ["Answers", "Runner"]

_log = logging.getLogger(__name__)

_PRIORITY = 50
"""See `optkit.engine.Request`: people who wait come first."""
_DEATHS = 3
"""Of workers, over one line: enough to believe that it is the cause."""
_PAGE = 64
"""Lines or answers that are read at a time."""
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds before a line that was turned away is tried again; the last one for ever."""
_AGAIN = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Seconds before a batch that could not go on is tried again; the last one for ever."""
_CLOCK_SECONDS = 60.0
"""How often the clock is looked at that says whether a batch has expired: machines sleep, and clocks are set."""


class Answers(Protocol):
    """What answers a body, as `optkit.serve.answering.Answering.answer`."""

    async def __call__(
        self, url: str, body: Mapping[str, Any], *, tenant: Tenant, priority: int = 0, record: Record | None = None
    ) -> dict[str, Any]:
        """Raises ApiError for what is wrong with the body, Refused or MachineError for what passes."""
        ...


class Runner:
    """A task for each batch that has not ended.

    Args:
        store: whose batches.
        db: the thread that the store belongs to.
        disk: threads that read and write files.
        answer: answers bodies.
        window: how many lines of a model may be with its engine at once.
        quota: of inputs.
        now: gives unix seconds.
    """

    def __init__(
        self,
        store: Store,
        db: Threads,
        disk: Threads,
        answer: Answers,
        window: Window,
        quota: Quota,
        now: Callable[[], float],
    ) -> None:
        self._store, self._db, self._disk = store, db, disk
        self._answer, self._window, self._quota, self._now = answer, window, quota, now
        self._seats, self._commits = Seats(window), Commits(lambda answers: db(store.add, answers))
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stoppable: dict[int, asyncio.Task[None]] = {}
        self._stopped: set[int] = set()
        self._closed = False
        # Checking and writing files is work for the disk and the interpreter's lock, of which there is one.
        self._bulk = asyncio.Lock()

    async def start(self) -> None:
        """Go on with everything that has not ended."""
        for batch in await self._db(self._store.unfinished):
            self.add(batch.seq)

    def add(self, seq: int) -> None:
        """Begin with a batch. Without effect after `close`: the next start finds it."""
        if self._closed:
            return
        self._tasks[seq] = asyncio.create_task(self._carry(seq))
        self._tasks[seq].add_done_callback(lambda _: self._left(seq))

    def stop(self, seq: int) -> None:
        """Take back the lines of a batch that was cancelled."""
        if seq in self._tasks:
            self._stopped.add(seq)
            if seq in self._stoppable:
                self._stoppable[seq].cancel()

    async def close(self) -> None:
        """Take back what is with the engines. It is done after the next start."""
        self._closed = True
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._commits.close()

    def _left(self, seq: int) -> None:
        del self._tasks[seq]
        self._stopped.discard(seq)

    async def _carry(self, seq: int) -> None:
        """To the end, whatever is in the way: a full disk, an error of our own."""
        for pause in chain(_AGAIN, repeat(_AGAIN[-1])):
            try:
                await self._go_on(seq)
                return
            except OptkitError as error:
                _log.error("batch %d waits: %s", seq, error)
            except Exception:
                _log.exception("batch %d waits", seq)
            await asyncio.sleep(pause)

    async def _go_on(self, seq: int) -> None:
        batch = await self._db(self._store.work, seq)
        if batch.status == "validating":
            async with self._bulk:
                await self._run(seq, self._validate(batch), None)
            batch = await self._db(self._store.work, seq)
        if batch.status == "in_progress":
            whole = await self._run(seq, self._feed(batch), batch.expires)
            await self._db(self._store.begin_end, seq, "completed" if whole else "expired")
            batch = await self._db(self._store.work, seq)
        if batch.ending is not None and not batch.ended:
            async with self._bulk:
                await self._produce(batch)
        while await self._db(self._store.forget, seq):
            pass

    async def _run(self, seq: int, work: Coroutine[Any, Any, None], until: float | None) -> bool:
        """Work, until it is done, stopped or late. Gives whether it was done."""
        if seq in self._stopped:
            work.close()
            return False
        task = self._stoppable[seq] = asyncio.create_task(work)
        try:
            while not task.done():
                left = _CLOCK_SECONDS if until is None else min(_CLOCK_SECONDS, until - self._now())
                if left <= 0:
                    break
                await asyncio.wait((task,), timeout=left)
            done = task.done() and not task.cancelled()
        finally:
            del self._stoppable[seq]
            task.cancel()
            await asyncio.wait((task,))
            failed = None if task.cancelled() else task.exception()
        if failed is not None:
            raise failed
        return done

    # --- the input

    async def _validate(self, batch: Work) -> None:
        checked = Checked(batch.endpoint, self._quota)
        with self._store.files.open(batch.input_file) as stream:
            pieces = checked.pieces(stream)
            while await self._disk(lambda: next(pieces, ...)) is None:
                pass
        if not checked.faults and self._window(checked.model) == 0:
            checked.faults.append(
                {"code": "model_not_found", "line": None, "message": "this server has no such model", "param": "model"}
            )
        await self._db(self._store.validated, batch.seq, checked, checked.faults)

    # --- the lines

    async def _feed(self, batch: Work) -> None:
        after = -1
        async with asyncio.TaskGroup() as group:
            while lines := await self._db(self._store.unanswered, batch.seq, after, _PAGE):
                for line in lines:
                    seat = await self._seats.take(batch.model, batch.tenant, batch.seq)
                    # Not in the task itself, which may be cancelled before it has begun.
                    group.create_task(self._line(batch, line, seat)).add_done_callback(partial(_released, seat))
                after = lines[-1].place

    async def _line(self, batch: Work, line: Line, seat: Seat) -> None:
        request = await self._disk(self._read, batch, line)
        status, body = await self._asked(batch, line, request["body"], seat)
        try:
            answer = answer_line(batch, line.place, request["custom_id"], status, body)
        except ValueError:  # a number that JSON does not have
            _log.exception("line %d of batch %s", line.place, batch.id)
            answer = answer_line(batch, line.place, request["custom_id"], 500, internal().body())
        await self._commits.add(answer)

    def _read(self, batch: Work, line: Line) -> dict[str, Any]:
        return parse(self._store.files.read(batch.input_file, line.start, line.length))

    async def _asked(
        self, batch: Work, line: Line, body: Mapping[str, Any], seat: Seat
    ) -> tuple[int, Mapping[str, Any]]:
        """Status and body of the answer."""
        if body.get("stream"):
            return 400, ApiError(400, "stream: a batch has nobody to stream to", param="stream").body()
        tenant = Tenant(name=batch.tenant, salt=batch.salt, admin=False)
        deaths, tries = line.deaths, 0
        while deaths < _DEATHS:
            if deaths:
                # The others that were with the engine when it died had it die, too. Alone, the one that does it shows.
                await seat.take(alone=True)
            try:
                return 200, await self._answer(batch.endpoint, body, tenant=tenant, priority=_PRIORITY)
            except (Refused, MachineError) as error:
                if isinstance(error, MachineError) or error.code == DIED:
                    deaths = await self._db(self._store.died, batch.seq, line.place)
            except ApiError as error:
                return error.status, error.body()
            except Exception:
                _log.exception("line %d of batch %s", line.place, batch.id)
                return 500, internal().body()
            # The seat is kept: whoever took it now would be turned away as well.
            await asyncio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
            tries += 1
        said = "the model's process died each time that it had this request"
        return 500, ApiError(500, said, kind="server_error", code=DIED).body()

    # --- the files

    async def _produce(self, batch: Work) -> None:
        made: dict[bool, Writer] = {}
        after = -1
        try:
            while rows := await self._db(self._store.answered, batch.seq, after, _PAGE):
                await self._disk(self._write, batch, rows, made)
                after = rows[-1][0].place
            for writer in [*made.values()]:
                await self._disk(writer.publish)
            await self._db(self._end, batch, made)
        except BaseException:
            for writer in made.values():
                writer.discard()
            raise

    def _write(self, batch: Work, rows: Sequence[tuple[Line, bool, str | None]], made: dict[bool, Writer]) -> None:
        for line, ok, text in rows:
            if text is None and batch.ending == "expired":
                text = expired_line(batch, line.place, self._read(batch, line)["custom_id"])
            if text is not None:
                if ok not in made:
                    made[ok] = self._store.files.begin()
                made[ok].write(text.encode() + b"\n")

    def _end(self, batch: Work, made: dict[bool, Writer]) -> None:
        named = {ok: (writer.id, writer.size) for ok, writer in made.items()}
        self._store.end(batch, named.get(True), named.get(False))
        made.clear()  # from here on they are not this call's to discard


def _released(seat: Seat, _: asyncio.Task[None]) -> None:
    seat.release()
