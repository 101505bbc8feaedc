"""An artifact of optkit, its batches planned by its own recipe.

Usage: python ours.py SEQUENCES ARTIFACT
"""

from __future__ import annotations

import sys
from pathlib import Path

from turns import Floats, sequences, take_turns

from optkit.artifact import open_artifact
from optkit.engine.encoder import embed, vocabulary_of
from optkit.engine.pooling import pooling_of
from optkit.engine.tensors import TensorEngine
from optkit.opening import files_of, open_files
from optkit.plugins import Plugins
from optkit.weights import sentence_files


def main() -> None:
    rows, artifact = sequences(), open_artifact(Path(sys.argv[2]))
    files, recipe = files_of(artifact), artifact.manifest.recipe
    session, batcher = open_files(recipe, files, Plugins.load())
    pooling, vocabulary = pooling_of(sentence_files(files.weights)), vocabulary_of(files.weights)

    def encode() -> Floats:
        return embed(TensorEngine(session, batcher, files.limits, vocabulary), rows, pooling)

    settings = {key: recipe[key] for key in ("transforms", "backend", "batching")}
    take_turns(encode, {"recipe": settings})


if __name__ == "__main__":
    main()
