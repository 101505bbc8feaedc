"""Every error that a user can cause or meet, each one line: where, what, what was found, what to do.

OptkitError             70  a bug, when raised as itself
├── GateFailed           1  the result misses a gate of the recipe
├── RecipeError          2  the recipe or the command line is wrong
├── RequestError         2  a request to a model that could never be served
├── DamagedError         3  an artifact or an input file is damaged
├── MissingError         4  hardware, an extra, a plugin or a file of the model is missing
└── MachineError         5  the machine refused: disk, memory, permissions
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "DamagedError",
    "GateFailed",
    "MachineError",
    "MissingError",
    "OptkitError",
    "RecipeError",
    "RequestError",
]


class OptkitError(Exception):
    """An error with a one-line message that needs no traceback.

    Args:
        what: what is wrong, lowercase, without a full stop.
        where: file, `file:line:column` or command that it concerns.
        found: the offending value, shown shortened.
        remedy: what the user can do about it.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, what: str, *, where: str = "", found: object = None, remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.found = found
        self.remedy = remedy
        super().__init__(self._line())

    def _line(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.found is not None:
            line += f", found {shown(self.found)}"
        if self.remedy:
            line += f"; {self.remedy}"
        return " ".join(line.split())


class GateFailed(OptkitError):
    """The optimized model misses a gate that its recipe sets."""

    exit_code = 1


class RecipeError(OptkitError):
    """The recipe, or the command line, asks for something that cannot be."""

    exit_code = 2


class RequestError(OptkitError):
    """A request to a model is wrong, or could never be served."""

    exit_code = 2


class DamagedError(OptkitError):
    """A file is not what its manifest or its format says."""

    exit_code = 3


class MissingError(OptkitError):
    """Something that the work needs is not on this machine."""

    exit_code = 4


class MachineError(OptkitError):
    """The machine refused: no space, no memory, no permission."""

    exit_code = 5


def shown(value: object, limit: int = 60) -> str:
    """`value` as it stands in a message: YAML's spelling of true, false and null, at most `limit` characters."""
    named = {True: "true", False: "false", None: "null"}
    text = named[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
