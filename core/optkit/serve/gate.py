"""How many requests of a model may be open: beyond that they are refused at once rather than left to wait."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from optkit.serve.errors import ApiError, Refused

__all__ = ["Gate"]

_LONGEST = 60
"""Seconds that a client is asked to wait at most."""


class Gate:
    """Of one model. Used in one event loop.

    Args:
        seats: requests that the model runs at once.
        queue: requests that may wait beyond them.
    """

    def __init__(self, seats: int, queue: int) -> None:
        self.seats, self.limit = seats, seats + queue
        self.open = 0
        self._seconds = 1.0
        """What a request took lately."""

    @contextmanager
    def passing(self, count: int = 1) -> Iterator[None]:
        """Count `count` requests as open for as long as the context lasts.

        Raises:
            Refused: 429, there is no room now.
            ApiError: 400, there would never be room for so many.
        """
        if count > self.limit:
            raise ApiError(
                400, f"the request holds {count} prompts, this server takes {self.limit} at a time; send fewer"
            )
        if self.open + count > self.limit:
            raise Refused(
                429,
                "the model's queue is full; try again later",
                kind="rate_limit_error",
                code="queue_full",
                headers={"retry-after": str(self.wait)},
            )
        self.open += count
        began = time.monotonic()
        try:
            yield
        finally:
            self.open -= count
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)

    @property
    def wait(self) -> int:
        """Seconds after which there should be room again."""
        ahead = max(0, self.open - self.seats) / self.seats
        return max(1, min(_LONGEST, math.ceil(0.5 * ahead * self._seconds)))
