"""Opens what an artifact holds, or what its recipe started from, by the names in the resolved recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optkit.artifact import Artifact
from optkit.backends import Backend, TokenSession
from optkit.batching import Batcher
from optkit.bench.arms import SessionArm, TransformersArm
from optkit.bench.interleave import Arm
from optkit.errors import DamagedError, MissingError
from optkit.plugins import Kind, Plugins
from optkit.sources import Source
from optkit.steps import Limits

__all__ = ["Files", "Opening", "bound", "open_arm", "open_session", "opening_of"]


@dataclass(frozen=True, slots=True)
class Files:
    """Where the optimized model lies, and what it was planned to hold."""

    runtime: Path
    weights: Path
    limits: Limits


@dataclass(frozen=True, slots=True)
class Opening:
    """All that a process needs to open one arm; it can be said in JSON."""

    recipe: Mapping[str, Any]
    """Resolved; only its `model`, `backend` and `batching` are looked at."""
    files: Files | None
    """None opens the recipe's unoptimized model in transformers."""


def opening_of(artifact: Artifact) -> Opening:
    """What opens a verified artifact."""
    manifest = artifact.manifest
    limits = Limits(manifest.max_batch_size, manifest.max_length)
    return Opening(manifest.recipe, Files(artifact.runtime, artifact.weights, limits))


def open_arm(opening: Opening, plugins: Plugins, name: str) -> Arm:
    """An arm, ready to run.

    Raises:
        MissingError: a plugin, the runtime, or the unoptimized model is not on this machine.
        DamagedError: the files or the recipe in the manifest are not what this version of optkit writes.
        MachineError: too little memory.
    """
    if opening.files is None:
        source: Source = bound("source", opening.recipe.get("model"), plugins)
        return TransformersArm(source.load(), name)
    session, batcher = _open(opening.recipe, opening.files, plugins)
    return SessionArm(session, batcher, name)


@contextmanager
def open_session(artifact: Artifact, plugins: Plugins) -> Iterator[tuple[TokenSession, Batcher]]:
    """The session of an artifact with the recipe's batching strategy; closed at the end. Raises as `open_arm` does."""
    opening = opening_of(artifact)
    assert opening.files is not None
    session, batcher = _open(opening.recipe, opening.files, plugins)
    with session:
        yield session, batcher


def _open(recipe: Mapping[str, Any], files: Files, plugins: Plugins) -> tuple[TokenSession, Batcher]:
    batcher: Batcher = bound("batcher", recipe.get("batching"), plugins)
    backend: Backend = bound("backend", recipe.get("backend"), plugins)
    missing = backend.unavailable()
    if missing is not None:
        raise MissingError(f"the artifact's backend {missing}", where=str(files.runtime))
    return backend.open(files.runtime, files.weights, files.limits), batcher


def bound(kind: Kind, node: Any, plugins: Plugins) -> Any:
    """A plugin's options from a manifest. Not by way of the whole recipe: its transforms need not be installed here."""
    if not (isinstance(node, dict) and len(node) == 1):
        raise DamagedError(f"the manifest's recipe names no {kind}", found=node, remedy="apply the recipe again")
    [(name, options)] = node.items()
    try:
        return plugins.get(kind, name).model_validate_json(json.dumps(options))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise DamagedError(
            f"the installed {kind} {name!r} does not take the manifest's {key} ({fault['msg']})",
            remedy="install the version that made the artifact, or apply the recipe again",
        ) from error
