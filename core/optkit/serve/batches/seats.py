"""How many lines are with an engine at once, and whose line is next: tenants in turn, each one's oldest batch first."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Seat", "Seats", "Window"]

Window = Callable[[str | None], int]
"""How many lines of a model may be with its engine at once, by the name in their bodies: enough to fill it, for example
twice the requests that it runs at once. 0: it is not served now."""

_LOOK_SECONDS = 0.5
"""How often a window that had no room is asked again without a line having left."""


class Seats:
    """Of all models. Used in one event loop."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._rooms: dict[str | None, _Room] = {}

    async def take(self, model: str | None, tenant: str, order: int) -> Seat:
        """Wait for a seat.

        Args:
            model: whose engine it is at.
            tenant: tenants that wait get seats in turn.
            order: among a tenant's; the lowest is first.
        """
        if model not in self._rooms:
            self._rooms[model] = _Room(lambda: self._window(model))
        seat = Seat(self._rooms[model], tenant, order)
        await seat.take()
        return seat


class Seat:
    """One line's place at an engine. Made by `Seats.take`."""

    def __init__(self, room: _Room, tenant: str, order: int) -> None:
        self._room, self._tenant, self._order = room, tenant, order
        self._held: _Waiter | None = None

    async def take(self, *, alone: bool = False) -> None:
        """Give up what is held, and wait for a seat; `alone`: with all others of the model empty, and before others."""
        self.release()
        waiter = _Waiter(self._tenant, self._order, alone, asyncio.get_running_loop().create_future())
        await self._room.wait(waiter)
        self._held = waiter

    def release(self) -> None:
        """Give it up; a second time has no effect."""
        held, self._held = self._held, None
        if held is not None:
            self._room.leave(held)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    tenant: str
    order: int
    alone: bool
    future: asyncio.Future[None]


class _Room:
    def __init__(self, window: Callable[[], int]) -> None:
        self._window = window
        self._taken = 0
        self._closed = False
        """Whether somebody is alone."""
        self._waiting: list[_Waiter] = []
        self._turns: dict[str, int] = {}
        self._clock = itertools.count(1)
        self._look: asyncio.TimerHandle | None = None

    async def wait(self, waiter: _Waiter) -> None:
        self._waiting.append(waiter)
        self._seat()
        try:
            await waiter.future
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._seat()  # it may have been one to be alone, whom others waited for
            else:
                self.leave(waiter)
            raise

    def leave(self, waiter: _Waiter) -> None:
        self._taken -= 1
        if waiter.alone:
            self._closed = False
        self._seat()

    def _seat(self) -> None:
        while self._waiting and not self._closed:
            alone = [waiter for waiter in self._waiting if waiter.alone]
            if self._taken >= (min(1, self._window()) if alone else self._window()):
                self._look_later()
                return
            following = min(alone or self._waiting, key=lambda one: (self._turns.get(one.tenant, 0), one.order))
            self._waiting.remove(following)
            self._turns[following.tenant] = next(self._clock)
            self._taken += 1
            self._closed = following.alone
            if not following.future.done():
                following.future.set_result(None)
        if not self._waiting and not self._taken:
            self._turns.clear()

    def _look_later(self) -> None:
        if self._look is None:
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_again)

    def _look_again(self) -> None:
        self._look = None
        self._seat()
