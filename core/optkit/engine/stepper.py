"""The thread that steps an engine while there is work, so that others can submit, cancel and wait."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from optkit.engine.ledger import Ledger
from optkit.engine.outputs import Delta
from optkit.engine.request import FinishReason, SamplingParams
from optkit.engine.stats import Stats
from optkit.engine.text import encode
from optkit.engine.text_engine import TextEngine
from optkit.errors import MachineError

__all__ = ["Stepper"]

_log = logging.getLogger(__name__)

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


class Stepper:
    """Owns an engine's steps. Every method may be called from any thread, and none waits for a step but `close`.

    What goes wrong with one request ends that request. An exception out of the engine itself is a bug: it ends all
    that is open with an error, and every submission after it is refused; nobody is left waiting.

    Args:
        engine: nobody else calls it from now on.
        deliver: called in the stepper's thread with what each step brought; `Delta.request` is the caller's key.
        failed: called there after an exception out of the engine, when all has ended.
    """

    def __init__(self, engine: TextEngine, deliver: Deliver, failed: Callable[[], None] | None = None) -> None:
        # Some tokenizers change their settings at their first call, which no other thread may see half done.
        encode(engine.tokenizer, "a")
        self._engine, self._deliver, self._failed = engine, deliver, failed
        self._inbox: deque[_Submission | _Cancellation] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: str | None = None
        self._keys: dict[int, int] = {}
        self._requests: dict[int, int] = {}
        self._ledger = Ledger()
        self._stepping_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="optkit-stepper", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> Stats:
        """A copy of the engine's counters; while a step runs they may be in the middle of it."""
        return replace(self._engine.stats)

    @property
    def failure(self) -> str | None:
        """What the engine died of, if it did."""
        return self._failure

    @property
    def silent(self) -> float:
        """Seconds that the step under way has taken so far; 0 between steps and when there is nothing to do."""
        since = self._stepping_since
        return 0.0 if since is None else time.monotonic() - since

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
        submission = _Submission(key, tokens, params, priority, time.monotonic(), timeout, salt, accepted)
        with self._changed:
            if self._failure is None and not self._closing:
                self._inbox.append(submission)
                self._changed.notify()
                return accepted
        accepted.set_exception(self._refusal())
        return accepted

    def cancel(self, key: int) -> None:
        """End a request within one step; its last delta says so. One that is unknown or has ended is left alone."""
        with self._changed:
            self._inbox.append(_Cancellation(key))
            self._changed.notify()

    def close(self, timeout: float | None = None) -> bool:
        """Cancel what is open and end the thread, after the step under way. Closing twice does nothing.

        Args:
            timeout: seconds to wait at most.

        Returns:
            Whether the thread has ended, and the engine's session can be closed.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- in the thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._stepping_since = time.monotonic()
                self._take_in()
                self._step()
                self._stepping_since = None
            self._take_in()
            for request in self._keys:
                self._engine.cancel(request)
            self._step()
            self._end("cancelled")
        except BaseException as error:
            _log.exception("the engine failed")
            self._end("error", f"the engine failed: {type(error).__name__}: {error}")
            if self._failed is not None:
                self._failed()

    def _wait(self) -> bool:
        """Until there is something to do. False: until `close`."""
        with self._changed:
            while not (self._inbox or self._closing):
                if not self._engine.busy:
                    self._changed.wait()
                elif self._engine.wait:
                    self._changed.wait(self._engine.wait)
                    break
                else:
                    break
            return not self._closing

    def _take_in(self) -> None:
        while True:
            try:
                message = self._inbox.popleft()
            except IndexError:
                return
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

    def _end(self, reason: FinishReason, failure: str = "") -> None:
        with self._changed:
            self._closing, self._failure = True, failure or None
            left = [one for one in self._inbox if isinstance(one, _Submission)]
            self._inbox.clear()
        self._stepping_since = None
        for one in left:
            if one.accepted.set_running_or_notify_cancel():
                one.accepted.set_exception(self._refusal())
        deltas = self._ledger.end(reason, failure)
        if deltas:
            self._deliver(deltas)

    def _refusal(self) -> MachineError:
        if self._failure is not None:
            return MachineError(self._failure, remedy="open it again; the lines on standard error say more")
        return MachineError("the engine is closed")
