"""Weights in bfloat16 for optkit, a metric of what the rounding changes, and a log of the steps of an apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_transforms() -> Registration:
    return {"cast.bfloat16": "optkit_bfloat16.cast:BFloat16"}


@hookimpl
def register_metrics() -> Registration:
    return {"total_variation": "optkit_bfloat16.distance:TotalVariation"}


@hookimpl
def register_commands(app: Any) -> None:
    from optkit_bfloat16.steps import show_steps

    app.command("steps")(show_steps)


@hookimpl
def step_finished(step: str, report: Mapping[str, Any]) -> None:
    from optkit_bfloat16.steps import append

    append(step, report)
