"""Following one request of an engine in the caller's thread."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

from optkit.engine.request import Event, Request

__all__ = ["Followed"]


class Followed(ABC):
    """An engine that is stepped by its caller.

    Attributes:
        wait: seconds after which `step` should be called again, when it waits for company; None: no such time.
    """

    wait: float | None

    @abstractmethod
    def add(self, request: Request) -> int:
        """Accept a request and return its id."""

    @abstractmethod
    def step(self) -> list[Event]:
        """Return what happened since the last call."""

    def stream(self, request: Request) -> Iterator[Event]:
        """Add one request and yield its events as they come.

        For an engine with one caller: other requests go on beside it, but their events are not kept for anybody.
        """
        identity = self.add(request)
        last = False
        while not last:
            for event in self.step():
                if event.request == identity:
                    last = event.last
                    yield event
            if self.wait:
                time.sleep(self.wait)
