"""`optkit batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optkit.cli.artifacts import ArtifactArgument, DraftOption, speculation_of
from optkit.cli.present import Steps, complain, counted, duration, emit_json, plugins_of, say
from optkit.cli.recipes import JsonOption

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("batch")(batch)


def batch(
    context: typer.Context,
    artifact: ArtifactArgument,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests, one a line, in OpenAI's batch format.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where the answers go, in the same order.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at OUT.")] = False,
    draft: DraftOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of requests, offline.

    Whatever stops it, the same command goes on where it was: answers are kept in OUT.partial until OUT is whole.
    """
    from optkit.engine.batch_file import run_batch

    plugins = plugins_of(context)
    try:
        with Steps() as steps:
            speculation = speculation_of(draft)
            outcome = run_batch(
                artifact, source, output, plugins, overwrite=overwrite, speculation=speculation, progress=steps
            )
    except KeyboardInterrupt:
        complain(f"interrupted; answers are kept in {output}.partial, the same command goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        emit_json(asdict(outcome))
        return
    counts = outcome.counts
    before = f", {outcome.resumed} of them before" if outcome.resumed else ""
    say(f"{counted(outcome.lines, 'line')} answered{before}: {counts.succeeded} succeeded, {counts.failed} failed")
    say(f"{counts.prompt_tokens} prompt and {counts.output_tokens} output tokens; {duration(outcome.seconds)} now")
    say(f"Answers: {output}")
