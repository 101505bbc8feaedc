"""Opens what an artifact holds, or what its recipe started from, as an arm of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optkit.artifact import Artifact
from optkit.backends import AnySession, EngineSession, TensorSession
from optkit.batching import Batcher
from optkit.bench.arms import EngineArm, SessionArm, TransformersArm
from optkit.bench.encoding import SessionEncodingArm, TransformersEncodingArm
from optkit.bench.imaging import SessionImageArm, TransformersImageArm
from optkit.bench.interleave import Arm
from optkit.engine.tensors import encodes_text
from optkit.model import Model
from optkit.opening import Files, bound, files_of, open_files
from optkit.plugins import Plugins
from optkit.sources import Source
from optkit.weights import FEATURE_EXTRACTION, IMAGE_CLASSIFICATION

__all__ = ["Opening", "arm_of_model", "arm_of_session", "open_arm", "opening_of"]


@dataclass(frozen=True, slots=True)
class Opening:
    """All that a process needs to open one arm; it can be said in JSON."""

    recipe: Mapping[str, Any]
    """Resolved; only its `model`, `backend` and `batching` are looked at."""
    files: Files | None
    """None opens the recipe's unoptimized model in transformers."""


def opening_of(artifact: Artifact) -> Opening:
    """What opens a verified artifact."""
    return Opening(artifact.manifest.recipe, files_of(artifact))


def open_arm(opening: Opening, plugins: Plugins, name: str) -> Arm:
    """An arm, ready to run.

    Raises:
        MissingError: a plugin, the runtime, or the unoptimized model is not on this machine.
        DamagedError: the files or the recipe in the manifest are not what this version of optkit writes.
        MachineError: too little memory.
    """
    if opening.files is None:
        source: Source = bound("source", opening.recipe.get("model"), plugins)
        return arm_of_model(source.load(), name)
    session, batcher = open_files(opening.recipe, opening.files, plugins)
    return arm_of_session(session, batcher, opening.files, name)


def arm_of_model(model: Model, name: str) -> Arm:
    """A loaded model in transformers as an arm."""
    if FEATURE_EXTRACTION in model.tags:
        return TransformersEncodingArm(model, name)
    return (TransformersImageArm if IMAGE_CLASSIFICATION in model.tags else TransformersArm)(model, name)


def arm_of_session(session: AnySession, batcher: Batcher, files: Files, name: str) -> Arm:
    """An open session with its batching strategy as an arm, which closes it.

    Args:
        session: over `files`.
        batcher: the strategy of the recipe; a runtime that batches by itself has no use for it.
        files: what the session was opened for.
        name: of the arm.
    """
    if isinstance(session, TensorSession) and not encodes_text(session):
        return SessionImageArm(session, batcher, files.limits, name)
    if isinstance(session, TensorSession):
        return SessionEncodingArm(session, batcher, files.weights, files.limits, name)
    if isinstance(session, EngineSession):
        return EngineArm(session, name)
    return SessionArm(session, batcher, name)
