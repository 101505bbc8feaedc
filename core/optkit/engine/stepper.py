"""The thread of an engine with text at both ends: submissions in, deltas out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from optkit.engine.ledger import Ledger
from optkit.engine.outputs import Delta
from optkit.engine.request import SamplingParams
from optkit.engine.stats import Stats
from optkit.engine.stepping import Stepping
from optkit.engine.text import encode
from optkit.engine.text_engine import TextEngine
from optkit.errors import MachineError

__all__ = ["Stepper"]

Deliver = Callable[[Sequence[Delta]], None]


@dataclass(frozen=True, slots=True)
class _Submission:
    key: int
    tokens: tuple[int, ...]
    params: SamplingParams
    priority: int
    arrived: float
    timeout: float | None
    salt: str
    accepted: Future[None]


@dataclass(frozen=True, slots=True)
class _Cancellation:
    key: int


class Stepper(Stepping[_Submission | _Cancellation]):
    """Owns an engine's steps; see `Stepping`.

    Args:
        engine: nobody else calls it from now on.
        deliver: called in the stepper's thread with what each step brought; `Delta.request` is the caller's key.
        failed: called there after an exception out of the engine, when all has ended.
    """

    def __init__(self, engine: TextEngine, deliver: Deliver, failed: Callable[[], None] | None = None) -> None:
        # Some tokenizers change their settings at their first call, which no other thread may see half done.
        encode(engine.tokenizer, "a")
        self._engine, self._deliver = engine, deliver
        self._keys: dict[int, int] = {}
        self._requests: dict[int, int] = {}
        self._ledger = Ledger()
        super().__init__(failed)

    @property
    def stats(self) -> Stats:
        """A copy of the engine's counters; while a step runs they may be in the middle of it."""
        return replace(self._engine.stats)

    def submit(
        self,
        key: int,
        tokens: tuple[int, ...],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout: float | None = None,
        salt: str = "",
    ) -> Future[None]:
        """Hand in a request; the future is done once the engine has it, before its first delta.

        Args:
            key: the caller's name for it, not in use by another open request.
            tokens: the prompt; encoding it is the caller's, so that it does not hold up the steps.
            params: how to sample.
            priority: see `Request`, as for the others.
            timeout: seconds from now.
            salt: of the prefix cache.

        Returns:
            A future that raises RequestError for what could never be served, and MachineError when the stepper is
            closed or failed. Cancelled before the engine has it, the request never starts.
        """
        accepted: Future[None] = Future()
        self._put(_Submission(key, tokens, params, priority, time.monotonic(), timeout, salt, accepted))
        return accepted

    def cancel(self, key: int) -> None:
        """End a request within one step; its last delta says so. One that is unknown or has ended is left alone."""
        self._put(_Cancellation(key))

    @property
    def _pause(self) -> float | None:
        return (self._engine.wait or 0.0) if self._engine.busy else None

    def _take(self, message: _Submission | _Cancellation) -> None:
        if isinstance(message, _Submission):
            self._accept(message)
        elif message.key in self._requests:
            self._engine.cancel(self._requests[message.key])

    def _accept(self, one: _Submission) -> None:
        if not one.accepted.set_running_or_notify_cancel():
            return
        # The time in the inbox counts: a long step must not prolong anybody's deadline.
        timeout = None if one.timeout is None else one.arrived + one.timeout - time.monotonic()
        try:
            request = self._engine.add(one.tokens, one.params, priority=one.priority, timeout=timeout, salt=one.salt)
        except Exception as error:
            one.accepted.set_exception(error)
            return
        self._keys[request] = one.key
        self._requests[one.key] = request
        self._ledger.enter(one.key, one.params.samples)
        one.accepted.set_result(None)

    def _step(self) -> None:
        if not self._engine.busy:
            return
        deltas = [replace(delta, request=self._keys[delta.request]) for delta in self._engine.step()]
        for delta in deltas:
            self._ledger.note(delta)
            if delta.last:
                del self._keys[self._requests.pop(delta.request)]
        if deltas:
            self._deliver(deltas)

    def _cancel_all(self) -> None:
        for request in self._keys:
            self._engine.cancel(request)

    def _end_all(self, failure: str) -> None:
        deltas = self._ledger.end("error" if failure else "cancelled", failure)
        if deltas:
            self._deliver(deltas)

    def _refuse(self, message: _Submission | _Cancellation, error: MachineError) -> None:
        if isinstance(message, _Submission) and message.accepted.set_running_or_notify_cancel():
            message.accepted.set_exception(error)
