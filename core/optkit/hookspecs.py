"""The hooks a plugin may implement. They only register; behaviour lives in the classes that they return.

A registration maps a name to a class, or to `"module:Class"`, which is imported when a recipe first names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

__all__ = ["Registration", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("optkit")
hookimpl = pluggy.HookimplMarker("optkit")

Registration = Mapping[str, type | str]


@hookspec
def register_transforms() -> Registration:
    """Subclasses of `optkit.transforms.Transform`, by the name that recipes use."""
    return {}


@hookspec
def register_backends() -> Registration:
    """Subclasses of `optkit.backends.Backend`."""
    return {}


@hookspec
def register_batchers() -> Registration:
    """Subclasses of `optkit.batching.Batcher`."""
    return {}


@hookspec
def register_sources() -> Registration:
    """Subclasses of `optkit.sources.Source`."""
    return {}


@hookspec
def register_datasets() -> Registration:
    """Subclasses of `optkit.datasets.TextDataset` or `ImageDataset`."""
    return {}


@hookspec
def register_metrics() -> Registration:
    """Subclasses of `optkit.metrics.TokenMetric`, `RunMetric` or `FootprintMetric`."""
    return {}


@hookspec
def register_commands(app: Any) -> None:
    """Add commands to the Typer app of `optkit`."""


@hookspec
def step_started(step: str) -> None:
    """A step of `optkit apply` starts. Observers cannot change it."""


@hookspec
def step_finished(step: str, report: Mapping[str, Any]) -> None:
    """A step ended, run or taken from the cache; `report` holds its key, seconds and measured effect."""
