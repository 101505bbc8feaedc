"""`optkit bench`, `optkit compare` and `optkit eval`: measuring again what an apply measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optkit.cli.artifacts import ArtifactArgument
from optkit.cli.present import Steps, emit_json, plugins_of
from optkit.cli.recipes import JsonOption, show_report

__all__ = ["add_to"]

PromptOption = Annotated[int | None, typer.Option(min=1, help="Prompt tokens; as the recipe says by default.")]
OutputOption = Annotated[int | None, typer.Option(min=8, help="Output tokens; as the recipe says by default.")]
BlocksOption = Annotated[int | None, typer.Option(min=3, max=1000, help="Interleaved blocks; as the recipe says.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("bench")(bench)
    app.command("compare")(compare)
    app.command("eval")(evaluate)


def bench() -> None: ...
def compare() -> None: ...
def evaluate() -> None: ...
