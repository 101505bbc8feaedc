"""From a finished artifact to a session with its batching strategy, by the names in the resolved recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optkit.artifact import Artifact
from optkit.backends import AnySession, Backend, EngineSession, TokenSession
from optkit.batching import Batcher
from optkit.errors import DamagedError, MissingError, RecipeError
from optkit.plugins import Kind, Plugins
from optkit.steps import Limits
from optkit.weights import FEATURE_EXTRACTION

__all__ = ["Files", "bound", "files_of", "open_files", "open_session", "token_session"]


@dataclass(frozen=True, slots=True)
class Files:
    """Where the optimized model lies, and what it was planned to hold."""

    runtime: Path
    weights: Path
    limits: Limits


def files_of(artifact: Artifact) -> Files:
    """Those of a verified artifact."""
    manifest = artifact.manifest
    limits = Limits(manifest.max_batch_size, manifest.max_length, manifest.kv_cache_tokens)
    return Files(artifact.runtime, artifact.weights, limits)


def open_files(recipe: Mapping[str, Any], files: Files, plugins: Plugins) -> tuple[AnySession, Batcher]:
    """The session over some files and the batching strategy of their recipe. The caller closes the session.

    Args:
        recipe: resolved; only its `backend` and `batching` are looked at.
        files: what the backend compiled.
        plugins: that hold both.

    Raises:
        MissingError: a plugin or the runtime is not on this machine.
        DamagedError: the files or the recipe are not what this version of optkit writes.
        MachineError: too little memory.
    """
    batcher: Batcher = bound("batcher", recipe.get("batching"), plugins)
    backend: Backend = bound("backend", recipe.get("backend"), plugins)
    missing = backend.unavailable()
    if missing is not None:
        raise MissingError(f"the artifact's backend {missing}", where=str(files.runtime))
    return backend.open(files.runtime, files.weights, files.limits), batcher


@contextmanager
def open_session(artifact: Artifact, plugins: Plugins) -> Iterator[tuple[TokenSession, Batcher]]:
    """The session of a causal language model's artifact, closed at the end. Raises as `open_files` does."""
    session, batcher = open_files(artifact.manifest.recipe, files_of(artifact), plugins)
    with session:
        yield token_session(session, artifact), batcher


def token_session(session: AnySession, artifact: Artifact) -> TokenSession:
    """The session of a causal language model that takes single steps; any other is closed.

    Raises:
        RecipeError: the artifact is another kind of model, or its runtime batches by itself.
    """
    if isinstance(session, TokenSession):
        return session
    session.close()
    if isinstance(session, EngineSession):
        raise RecipeError(
            "its runtime batches by itself and takes no single steps",
            where=str(artifact.path),
            remedy="apply the recipe with another backend",
        )
    encoder = FEATURE_EXTRACTION in artifact.manifest.tags
    remedy = "optkit.Encoder runs an encoder" if encoder else "optkit.WorkerTensors runs it"
    raise RecipeError("is no causal language model", where=str(artifact.path), remedy=remedy)


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
