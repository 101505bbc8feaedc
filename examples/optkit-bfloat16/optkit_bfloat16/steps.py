"""A log of the steps of `optkit apply`, one line of JSON each, and the command that shows it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from optkit.errors import DamagedError, MachineError, MissingError

__all__ = ["VARIABLE", "append", "show_steps"]

VARIABLE = "OPTKIT_STEPS_FILE"


def append(step: str, report: Mapping[str, Any]) -> None:
    """Add a step to the file that the environment variable names, if it is set.

    Raises:
        MachineError: the file cannot be written.
    """
    file = os.environ.get(VARIABLE)
    if not file:
        return
    # The samples of a benchmark are in report.json; here they would bury everything else.
    told = {key: value for key, value in report.items() if key != "samples"}
    line = json.dumps({"time": time.time(), "step": step, **told}, default=str) + "\n"
    try:
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.write(line)
    except OSError as error:
        raise MachineError(f"cannot be written ({error.strerror})", where=file, remedy=f"unset {VARIABLE}") from error


def show_steps(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=f"What {VARIABLE} named during optkit apply.")],
) -> None:
    """Show a log of steps: when each ended, and how long it took."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        entries = [(step["time"], step["seconds"], step["cached"], step["step"]) for step in map(json.loads, lines)]
    except FileNotFoundError as error:
        remedy = f"{VARIABLE}={file} optkit apply RECIPE writes it"
        raise MissingError("no such file", where=str(file), remedy=remedy) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError("no log of steps", where=str(file)) from error
    for ended, seconds, cached, step in entries:
        clock = time.strftime("%H:%M:%S", time.localtime(ended))
        typer.echo(f"{clock}  {'cached' if cached else f'{seconds:.1f} s':>8}  {step}")
