"""How results and progress look in a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import typer

__all__ = ["Steps", "complain", "counted", "duration", "emit_json", "lowered_as", "plugins_of", "say", "table"]


def say(text: str = "") -> None:
    """One line to standard output."""
    typer.echo(text)


def complain(line: str) -> None:
    """One line to standard error."""
    typer.echo(f"optkit: {line}", err=True)


def emit_json(data: Any) -> None:
    """JSON for a script to read."""
    typer.echo(json.dumps(data, indent=1, sort_keys=False, default=str))


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def counted(count: int, noun: str) -> str:
    """`1 sequence`, `2 sequences`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def lowered_as(tag: str, kernel: str, native: bool, reason: str) -> str:
    """What becomes of one weight format."""
    how = "native" if native else "not native"
    return f"{tag} -> {kernel} ({how}{f'; {reason}' if reason else ''})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> None:
    """A plain table, columns as wide as their contents; those in `right` are flushed right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    flush = set(right)
    for index, row in enumerate(cells):
        padded = [
            cell.rjust(width) if column in flush else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        say("  ".join(padded).rstrip())
        if index == 0:
            say("  ".join("-" * width for width in widths))


def plugins_of(context: typer.Context) -> Any:
    """The plugins that the global options allow; broken ones are named on standard error."""
    from optkit.plugins import Plugins

    options: Mapping[str, Any] = context.obj or {}
    plugins = Plugins.load(**options)
    for broken in plugins.broken:
        complain(f"plugin {broken.plugin!r} of {broken.distribution} {broken.version} is left out: {broken.reason}")
    return plugins


class Steps:
    """Shows progress on standard error: bars in a terminal, one line for each finished step elsewhere.

    ```python
    with Steps() as steps:
        steps("compile", 3, 10, "layer 3")
    ```
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:32}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[what]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._finished: tuple[str, str] | None = None

    def __call__(self, step: str, done: int, total: int, what: str) -> None:
        """`done` of `total` of the step are done, now at `what`."""
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=total, what=what)
        self._bars.update(self._tasks[step], completed=done, total=total, what=what[:40])
        if self._console.is_terminal:
            return
        if self._finished is not None and self._finished[0] != step:
            self._tell()
        if done == total:
            # The last word counts: a step reports its parts first, and then how long all of it took.
            self._finished = step, what if total == 1 and what else "done"

    def _tell(self) -> None:
        if self._finished is not None:
            print("  {}: {}".format(*self._finished), file=sys.stderr, flush=True)
            self._finished = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._tell()
