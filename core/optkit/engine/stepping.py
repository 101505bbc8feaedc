"""The thread that steps an engine while there is work, so that others can submit, cancel and wait."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from optkit.errors import MachineError

__all__ = ["Stepping"]

_log = logging.getLogger(__name__)

Message = TypeVar("Message")


class Stepping(ABC, Generic[Message]):
    """Owns an engine's steps. Every method may be called from any thread, and none waits for a step but `close`.

    What goes wrong with one request ends that request. An exception out of the engine itself is a bug: it ends all
    that is open with an error, and every submission after it is refused; nobody is left waiting.

    Args:
        failed: called in the thread after an exception out of the engine, when all has ended.
    """

    def __init__(self, failed: Callable[[], None] | None) -> None:
        self._failed = failed
        self._inbox: deque[Message] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._failure: str | None = None
        self._stepping_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="optkit-stepper", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """What the engine died of, if it did."""
        return self._failure

    @property
    def silent(self) -> float:
        """Seconds that the step under way has taken so far; 0 between steps and when there is nothing to do."""
        since = self._stepping_since
        return 0.0 if since is None else time.monotonic() - since

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

    def _put(self, message: Message) -> None:
        with self._changed:
            if not self._closing:
                self._inbox.append(message)
                self._changed.notify()
                return
        self._refuse(message, self._refusal())

    # --- in the thread, but for _refuse

    @property
    @abstractmethod
    def _pause(self) -> float | None:
        """Seconds until the next step is due: 0 at once, None when there is nothing to do."""

    @abstractmethod
    def _take(self, message: Message) -> None:
        """Hand a message to the engine."""

    @abstractmethod
    def _step(self) -> None:
        """One step, if there is something to do, and what it brought to whom it concerns."""

    @abstractmethod
    def _cancel_all(self) -> None:
        """Cancel every open request."""

    @abstractmethod
    def _end_all(self, failure: str) -> None:
        """End what is still open: nothing else will. Of a failure, or because of `close` if that is empty."""

    @abstractmethod
    def _refuse(self, message: Message, error: MachineError) -> None:
        """Answer a message that the engine will not see."""

    def _run(self) -> None:
        try:
            while self._wait():
                self._stepping_since = time.monotonic()
                self._take_in()
                self._step()
                self._stepping_since = None
            self._take_in()
            self._cancel_all()
            self._step()
            self._end("")
        except BaseException as error:
            _log.exception("the engine failed")
            self._end(f"the engine failed: {type(error).__name__}: {error}")
            if self._failed is not None:
                self._failed()

    def _wait(self) -> bool:
        """Until there is something to do. False: until `close`."""
        with self._changed:
            while not (self._inbox or self._closing):
                pause = self._pause
                if pause is None:
                    self._changed.wait()
                else:
                    if pause:
                        self._changed.wait(pause)
                    break
            return not self._closing

    def _take_in(self) -> None:
        while True:
            try:
                message = self._inbox.popleft()
            except IndexError:
                return
            self._take(message)

    def _end(self, failure: str) -> None:
        with self._changed:
            self._closing, self._failure = True, failure or None
            left = list(self._inbox)
            self._inbox.clear()
        self._stepping_since = None
        for message in left:
            self._refuse(message, self._refusal())
        self._end_all(failure)

    def _refusal(self) -> MachineError:
        if self._failure is not None:
            return MachineError(self._failure, remedy="open it again; the lines on standard error say more")
        return MachineError("the engine is closed")
