"""How many copies of a server there are, and what each may have of the machines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from optkit.errors import RecipeError

__all__ = ["Replicas", "cores_for_each", "target"]

_TEXT = re.compile(r"(?P<least>[1-9][0-9]{0,3})(?::(?P<most>[1-9][0-9]{0,3}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Replicas:
    """As many as the load asks for, from `least` to `most`."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of `N` or `MIN:MAX`.

        Raises:
            RecipeError: it is neither.
        """
        match = _TEXT.fullmatch(text)
        if match is not None:
            least, most = int(match["least"]), int(match["most"] or match["least"])
            if least <= most:
                return cls(least, most)
        raise RecipeError(
            "is no number of replicas", where="--replicas", found=text, remedy="give N or MIN:MAX, for example 2 or 1:4"
        )

    @property
    def fixed(self) -> bool:
        """Whether the load changes nothing."""
        return self.least == self.most


def cores_for_each(nodes: Sequence[int], replicas: int) -> int:
    """The most cores that each replica can have, if none spans two nodes and all get as many; 0 if one would get none.

    Args:
        nodes: cores of each.
        replicas: that must fit.
    """
    return next((each for each in range(max(nodes), 0, -1) if sum(node // each for node in nodes) >= replicas), 0)


def target(seats: int, queue: int) -> float:
    """Open requests of one replica beyond which another one pays: all seats taken, and half as many requests waiting.

    Args:
        seats: requests that its models run at once.
        queue: requests that may wait beyond them.
    """
    return seats + min(seats / 2, queue)
