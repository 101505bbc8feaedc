"""`optkit plugins`, `optkit sys` and `optkit cache`: what is installed, what this machine can do, what is kept."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from optkit.cli.present import Steps, emit_json, plugins_of, say, table
from optkit.cli.recipes import JsonOption
from optkit.quantities import size

__all__ = ["add_to", "peaks_of_machine"]


def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())


plugins_app = typer.Typer(
    invoke_without_command=True, callback=_help, help="List installed plugins, or show one with its options."
)
cache_app = typer.Typer(
    invoke_without_command=True, callback=_help, help="List or clear the finished steps that apply keeps."
)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(plugins_app, name="plugins")
    app.command("sys")(describe_machine)
    app.add_typer(cache_app, name="cache")


@plugins_app.command("list")
def list_plugins(context: typer.Context, as_json: JsonOption = False) -> None:
    """List what recipes can name, and whether it can run here."""
    plugins = plugins_of(context)
    rows = []
    for offer in plugins.registered:
        state = plugins.state(offer)
        rows.append(
            {"kind": offer.kind, "name": offer.name, "plugin": offer.plugin, "state": state or "ready"}
            | {"distribution": offer.distribution, "version": offer.version}
        )
    if as_json:
        emit_json({"plugins": rows, "broken": [asdict(b) for b in plugins.broken], "blocked": plugins.blocked})
        return
    table(
        ("kind", "name", "from", "state"),
        [(row["kind"], row["name"], f"{row['distribution']} {row['version']}", row["state"]) for row in rows],
    )
    if plugins.blocked:
        say(f"\nleft out: {', '.join(plugins.blocked)}")


@plugins_app.command("show")
def show_plugin(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A name from optkit plugins list.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a plugin does and which options it takes."""
    import difflib
    import inspect
    import json

    from optkit.errors import RecipeError
    from optkit.plugins import KINDS

    plugins = plugins_of(context)
    kinds = [kind for kind in KINDS if name in plugins.names(kind)]
    if not kinds:
        near = difflib.get_close_matches(name, {offer.name for offer in plugins.registered}, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "optkit plugins list shows all"
        raise RecipeError("no plugin of that name", where="plugins show", found=name, remedy=remedy)
    for kind in kinds:
        target = plugins.get(kind, name)
        schema = target.model_json_schema()
        if as_json:
            emit_json({"kind": kind, "name": name, "schema": schema})
            continue
        say(f"{kind} {name}\n\n{inspect.getdoc(target)}\n")
        required, options = schema.get("required", []), schema.get("properties", {})
        if not options:
            say("No options.")
            continue
        table(
            ("option", "default", "what it does"),
            [
                (
                    option,
                    "required" if option in required else json.dumps(facts.get("default")),
                    " ".join(facts.get("description", "").split()),
                )
                for option, facts in options.items()
            ],
        )


def describe_machine(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False, as_json: JsonOption = False
) -> None:
    """Say what this machine is and can do.

    Its ceilings, memory bandwidth and matrix products, are measured once, in about ten seconds, and kept.
    """
    from optkit import hardware

    machine, peaks = hardware.machine(), peaks_of_machine(refresh=refresh)
    if as_json:
        emit_json({"machine": asdict(machine), "peaks": peaks.model_dump()})
        return
    say(f"processor  {machine.cpu}, {machine.cores} usable cores, {' '.join(machine.isa)}")
    say(f"memory     {machine.memory.total / 1e9:.1f} GB, {machine.memory.available / 1e9:.1f} GB available")
    say(f"devices    {', '.join(device.name for device in machine.devices) or 'no GPU'}")
    say(f"system     {machine.system}, Python {machine.python}")
    say(f"libraries  {', '.join(f'{name} {version}' for name, version in machine.libraries.items())}")
    say(f"bandwidth  read {peaks.read_gb_per_s:.1f} GB/s, copy {peaks.copy_gb_per_s:.1f} GB/s")
    for label, value, unit in (
        ("fp32", peaks.fp32_gflops, "GFLOP/s"),
        ("bf16", peaks.bf16_gflops, "GFLOP/s"),
        ("int8", peaks.int8_gops, "GOP/s"),
    ):
        say(f"{label} GEMM  {value:,.0f} {unit}" if value else f"{label} GEMM  not supported by this torch")


def peaks_of_machine(*, refresh: bool = False) -> Any:
    """The machine's measured ceilings; measured now if they are not kept from before."""
    from optkit import hardware

    peaks = None if refresh else hardware.peaks()
    if peaks is None:
        with Steps() as steps:
            peaks = hardware.measure(lambda done, total, what: steps("measure ceilings", done, total, what))
    return peaks


@cache_app.command("list")
def list_cache(as_json: JsonOption = False) -> None:
    """List the finished steps that are kept."""
    from datetime import datetime

    from optkit.apply.cache import StepCache

    entries = sorted(StepCache().entries(), key=lambda entry: entry[2], reverse=True)
    if as_json:
        emit_json([{"key": s.key, "step": s.name, "bytes": count, "last_used": used} for s, count, used in entries])
        return
    if not entries:
        say(f"nothing is kept in {StepCache().root}")
        return
    table(
        ("step", "size", "last used", "key"),
        [
            (step.name, size(count), f"{datetime.fromtimestamp(used):%Y-%m-%d %H:%M}", step.key[:12])
            for step, count, used in entries
        ],
        right=(1,),
    )
    say(f"\n{size(sum(count for _, count, _ in entries))} in {StepCache().root}")


@cache_app.command("clear")
def clear_cache(
    unused_for: Annotated[
        float, typer.Option(min=0.0, metavar="DAYS", help="Only what was not used for so long.")
    ] = 0.0,
) -> None:
    """Remove finished steps; artifacts stay as they are.

    The next apply makes them again.
    """
    from optkit.apply.cache import StepCache

    say(f"freed {size(StepCache().clear(unused_for=unused_for * 86_400))}")
