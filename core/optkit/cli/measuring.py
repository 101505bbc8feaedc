"""`optkit bench`, `optkit eval` and `optkit compare`: measuring finished artifacts again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optkit.cli.artifacts import ArtifactArgument
from optkit.cli.present import Steps, emit_json, plugins_of, say
from optkit.cli.recipes import JsonOption, show_report

__all__ = ["add_to"]

PromptOption = Annotated[int | None, typer.Option(min=1, help="Prompt tokens; as in the recipe by default.")]
OutputOption = Annotated[int | None, typer.Option(min=8, help="Output tokens; as in the recipe by default.")]
BlocksOption = Annotated[int | None, typer.Option(min=3, max=1000, help="Interleaved blocks; as in the recipe.")]
SamplesOption = Annotated[Path | None, typer.Option("--samples", help="Write every timed run to this JSONL file.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("bench")(bench)
    app.command("eval")(evaluate)
    app.command("compare")(compare)


def bench(
    context: typer.Context,
    artifact: ArtifactArgument,
    prompt_tokens: PromptOption = None,
    output_tokens: OutputOption = None,
    blocks: BlocksOption = None,
    samples: SamplesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the speed and size of an artifact beside its original.

    And its peak memory. Artifact and original run by turns in randomized blocks, and the artifact a second time
    against itself for the noise.
    """
    _measure(context, [artifact], _chosen(prompt_tokens, output_tokens, blocks), samples, as_json, quality=False)


def evaluate(context: typer.Context, artifact: ArtifactArgument, as_json: JsonOption = False) -> None:
    """Measure the quality of an artifact beside its original.

    On the text that the recipe names.
    """
    _measure(context, [artifact], None, None, as_json, quality=True)


def compare(
    context: typer.Context,
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT", help="Two or more; the first is the reference.")
    ],
    prompt_tokens: PromptOption = None,
    output_tokens: OutputOption = None,
    blocks: BlocksOption = None,
    samples: SamplesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure artifacts beside the first of them.

    Quality, on the first one's text; speed, memory and size, with the first one's lengths.
    """
    from optkit.errors import RecipeError

    if len(set(artifacts)) < len(artifacts) or len(artifacts) < 2:
        raise RecipeError(
            "needs two or more different artifacts",
            where="compare",
            found=" ".join(map(str, artifacts)),
            remedy="name each once",
        )
    _measure(context, artifacts, _chosen(prompt_tokens, output_tokens, blocks), samples, as_json, quality=True)


def _chosen(prompt_tokens: int | None, output_tokens: int | None, blocks: int | None) -> dict[str, int]:
    chosen = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "blocks": blocks}
    return {key: value for key, value in chosen.items() if value is not None}


def _measure(
    context: typer.Context,
    paths: list[Path],
    chosen: dict[str, int] | None,
    samples: Path | None,
    as_json: bool,
    *,
    quality: bool,
) -> None:
    from optkit.errors import RecipeError
    from optkit.measure import baseline_of, check_same_task, contest, contestant, task_of
    from optkit.recipe import Benchmark

    plugins = plugins_of(context)
    if samples is not None:
        _write(samples, [])  # refuse before the measurement what would fail after it
    opened = [contestant(path) for path in paths]
    check_same_task([one for _, one in opened])
    artifact = opened[0][1]
    task = task_of(artifact.manifest.tags)
    if not task.generates and chosen is not None and chosen.keys() - {"blocks"}:
        raise RecipeError(
            f"--prompt-tokens and --output-tokens mean nothing for its task ({task.noun})",
            where=str(artifact.path),
            remedy="leave them out",
        )
    contestants = [one for one, _ in opened]
    if len(contestants) == 1:
        contestants.insert(0, baseline_of(artifact, plugins))
    settings = None if chosen is None else Benchmark(**{**artifact.manifest.recipe["benchmark"], **chosen})
    if settings is not None and task.generates:
        _check_room(settings, artifact.manifest.recipe["evaluation"], [one for _, one in opened])
    with Steps() as steps:
        figures, lines = contest(contestants, artifact, settings, plugins, steps, with_quality=quality)
    if samples is not None:
        _write(samples, lines)
    if as_json:
        emit_json({"reference": contestants[0].name, "figures": figures})
        return
    for number, (name, metrics) in enumerate(figures.items()):
        say(f"{chr(10) if number else ''}{name} beside {contestants[0].name}\n")
        show_report({"metrics": metrics})


def _check_room(settings: Any, evaluation: dict[str, Any], artifacts: list[Any]) -> None:
    """Refuse lengths that fit into no session, or prompts longer than the text that they are taken from."""
    from optkit.errors import RecipeError

    remedy = "lower --prompt-tokens or --output-tokens"
    needed = settings.prompt_tokens + settings.output_tokens
    for artifact in artifacts:
        held = artifact.manifest.max_length
        if needed > held:
            raise RecipeError(
                f"holds {held} tokens, prompt and output need {needed}", where=str(artifact.path), remedy=remedy
            )
    if settings.prompt_tokens > evaluation["tokens"]:
        raise RecipeError(
            f"the recipe's evaluation text has {evaluation['tokens']} tokens",
            found=settings.prompt_tokens,
            remedy=remedy,
        )


def _write(file: Path, lines: list[Any]) -> None:
    from optkit.errors import MachineError

    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise MachineError(
            f"cannot be written ({error.strerror})", where=str(file), remedy="choose another file"
        ) from error
