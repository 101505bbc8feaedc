"""What is wrong with a command line, in one line like every other error."""

from __future__ import annotations

import re
from typing import Any

from optkit.errors import shown

__all__ = ["explained"]


def explained(error: Any) -> str:
    """Where, what, what was found and what to do.

    Args:
        error: typer's UsageError.
    """
    command = error.ctx.command_path if error.ctx is not None else "optkit"
    said = " ".join(error.format_message().split()).rstrip(".")
    said = said.replace(": Input should be ", ": must be ").replace(". Did you mean", "; did you mean")
    said = re.sub(r", unable to parse string as .*", "", said)
    said = re.sub(r"; did you mean (.*), ([^,]*)\?$", r"; did you mean \1 or \2?", said)
    said = re.sub(r" \(Possible options: (.*)\)$", r"; did you mean \1?", said)
    found = _found(error)
    line = f"{command.removeprefix('optkit').strip()}: {said[:1].lower()}{said[1:]}".removeprefix(": ")
    if found is not None:
        line = f"{line}, found {shown(found)}"
    return line if line.endswith("?") else f"{line}; see {command} --help"


def _found(error: Any) -> object:
    """The value that a parameter refused. Typer leaves it to the error of pydantic that it wraps."""
    from pydantic import ValidationError

    cause = error.__cause__
    return cause.errors()[0]["input"] if isinstance(cause, ValidationError) else None
