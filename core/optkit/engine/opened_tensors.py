"""An artifact of a model of one step, opened as the engines over its session."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optkit.artifact import open_artifact
from optkit.backends import TensorSession
from optkit.batching import Batcher
from optkit.engine.arrays import ArrayEngine
from optkit.engine.encoder import vocabulary_of
from optkit.engine.pooling import Pooling, pooling_of
from optkit.engine.tensors import TensorEngine, encodes_text
from optkit.errors import RecipeError
from optkit.opening import Files, files_of, open_files
from optkit.plugins import Plugins
from optkit.weights import sentence_files

__all__ = ["OpenedTensors", "open_tensors"]


@dataclass(frozen=True, slots=True)
class OpenedTensors:
    """The engines over one session; one thread steps both. Close it afterwards."""

    name: str
    """Of the artifact."""
    max_length: int
    """Tokens of one sequence, for a text encoder."""
    session: TensorSession
    arrays: ArrayEngine
    texts: TensorEngine | None = None
    """For a text encoder."""
    pooling: Pooling | None = None
    """Of a text encoder."""

    def close(self) -> None:
        """Close the session. Closing twice does nothing."""
        self.session.close()


def open_tensors(path: Path, plugins: Plugins) -> OpenedTensors:
    """Verify an artifact and open it.

    Args:
        path: the artifact's directory.
        plugins: that hold its backend and batching strategy.

    Raises:
        MissingError: there is no artifact, or its backend or batching strategy is not on this machine.
        DamagedError: a file is not what the manifest says.
        RecipeError: it is a causal language model, or its batching strategy cuts what an encoder needs whole.
        MachineError: too little memory.
    """
    artifact = open_artifact(path)
    name, files = artifact.manifest.name, files_of(artifact)
    session, batcher = open_files(artifact.manifest.recipe, files, plugins)
    if not isinstance(session, TensorSession):
        session.close()
        raise RecipeError("is a causal language model", where=str(artifact.path), remedy="optkit.WorkerEngine runs it")
    try:
        return _over(session, batcher, files, name)
    except BaseException:
        session.close()
        raise


def _over(session: TensorSession, batcher: Batcher, files: Files, name: str) -> OpenedTensors:
    limits = files.limits
    if not encodes_text(session):
        return OpenedTensors(name, limits.max_length, session, ArrayEngine(session, batcher, limits))
    bounds = _bounds(files.weights)
    texts = TensorEngine(session, batcher, limits, bounds["input_ids"])
    # Here, and not when somebody sends a long text: that would end the process with all that is in it.
    texts.check_strategy(limits.max_length)
    arrays = ArrayEngine(session, batcher, limits, bounds)
    return OpenedTensors(name, limits.max_length, session, arrays, texts, pooling_of(sentence_files(files.weights)))


def _bounds(weights: Path) -> Mapping[str, int]:
    """One more than the largest value that each input of a text encoder may hold."""
    bounds = {"input_ids": vocabulary_of(weights), "attention_mask": 2}
    types = json.loads((weights / "config.json").read_text(encoding="utf-8")).get("type_vocab_size")
    return bounds if types is None else bounds | {"token_type_ids": int(types)}
