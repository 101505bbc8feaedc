"""`optkit plan`, `optkit apply` and `optkit schema`: what works on a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optkit.cli.present import Steps, complain, duration, emit_json, lowered_as, plugins_of, say, table
from optkit.quantities import parameters, size

__all__ = ["add_to"]

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("apply")(apply_recipe)
    app.command("plan")(plan_recipe)
    app.command("schema")(write_schema)


def apply_recipe(
    context: typer.Context,
    recipe: RecipeArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The artifact's directory; artifacts/NAME by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that stands there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Optimize a model by a recipe, and measure what it gained.

    The artifact is published only if it keeps the recipe's gates. Finished steps are kept: an interrupted apply goes on
    where it was.
    """
    from optkit import hardware
    from optkit.apply import apply, make_plan
    from optkit.recipe import load_recipe

    hardware.keep_freed_memory()
    plugins = plugins_of(context)
    loaded = load_recipe(recipe, plugins)
    plan = make_plan(loaded, plugins)
    target = output or Path("artifacts") / loaded.name
    for warning in plan.warnings:
        complain(f"warning: {warning}")
    with Steps() as steps:
        outcome = apply(plan, plugins, target, progress=steps, overwrite=overwrite)
    if as_json:
        emit_json({"artifact": str(outcome.artifact.path), "existed": outcome.existed, "report": outcome.report})
        return
    show_report(outcome.report)
    say()
    say(f"{'Already there' if outcome.existed else 'Published'}: {target}")
    say(plan.task.usage(target))


def show_report(report: Any) -> None:
    """The table of a report: metric, baseline, optimized, change, verdict; then the gates."""
    from optkit.apply.report import table_rows

    rows = table_rows(report["metrics"])
    table(
        ("metric", "baseline", "optimized", "change [95% interval]", "verdict"),
        [(row.metric, row.baseline, row.value, row.change, row.verdict) for row in rows],
        right=(1, 2),
    )
    for number, gate in enumerate(report.get("gates", ())):
        if not number:
            say()
        say(f"{'passed' if gate['passed'] else 'FAILED'}  {gate['message']}")


def plan_recipe(context: typer.Context, recipe: RecipeArgument, as_json: JsonOption = False) -> None:
    """Say what a recipe will do here, without doing it.

    Checks it, reads no weights, and shows the tags after each step, the kernel of each weight format, memory and time.
    """
    from dataclasses import asdict

    from optkit.apply import make_plan
    from optkit.recipe import load_recipe

    plugins = plugins_of(context)
    plan = make_plan(load_recipe(recipe, plugins), plugins)
    estimate = plan.estimate
    if as_json:
        emit_json(
            {
                "recipe": plan.recipe.resolved(),
                "model": {"name": plan.card.name, "parameters": plan.card.parameters, "tags": sorted(plan.card.tags)},
                "steps": [{"name": step.name, "tags": sorted(step.tags)} for step in plan.steps],
                "lowering": {tag: asdict(lowered) for tag, lowered in plan.lowering.items()},
                "limits": asdict(plan.limits),
                "estimate": asdict(estimate),
                "warnings": list(plan.warnings),
            }
        )
        return
    for warning in plan.warnings:
        complain(f"warning: {warning}")
    say(f"model    {plan.card.name}: {parameters(plan.card.parameters)}, {' '.join(sorted(plan.card.tags))}")
    for number, step in enumerate(plan.steps, 1):
        say(f"step {number}   {step.name}: {' '.join(sorted(step.tags - plan.card.tags))}")
    if plan.recipe.calibration is not None:
        asked = plan.recipe.calibration
        say(f"data     {asked.dataset.name}: {plan.task.samples_in_words(asked)} to calibrate on")
    say(f"backend  {plan.recipe.backend.name}")
    for tag, lowered in sorted(plan.lowering.items()):
        say(f"         {lowered_as(tag, lowered.kernel, lowered.native, lowered.reason)}")
    limits = plan.limits
    batch = plan.task.batch_in_words(limits.max_batch_size, limits.max_length)
    own = plan.recipe.backend.options.own_batch_size is not None
    say(f"batching {'of its own' if own else plan.recipe.batching.name}: {batch}")
    for gate in plan.recipe.gates or ():
        side, limit = ("at_most", gate.at_most) if gate.at_most is not None else ("at_least", gate.at_least)
        say(f"gate     {gate.metric} {side} {limit}")
    say(
        f"needs    about {size(estimate.memory_bytes)} of memory, {size(estimate.disk_bytes)} of disk "
        f"and {duration(estimate.seconds)}"
    )
    say(f"\nNext: optkit apply {recipe}")


def write_schema(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file.")] = None,
) -> None:
    """Write the JSON Schema of recipes, for editors.

    It holds all installed plugins, so that an editor completes and checks recipes as they are written.
    """
    import json

    from optkit.errors import MachineError
    from optkit.recipe import recipe_schema

    schema = recipe_schema(plugins_of(context))
    if output is None:
        emit_json(schema)
        return
    try:
        output.write_text(json.dumps(schema, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"cannot be written ({error.strerror})", where=str(output), remedy="choose another file"
        ) from error
    say(f"wrote {output}")
    say(f"Next: put this first in a recipe: # yaml-language-server: $schema={output}")
