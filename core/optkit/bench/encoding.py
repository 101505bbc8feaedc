"""The two ways to run an encoder that every benchmark sets side by side: sentence-transformers', and ours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optkit.backends import TensorSession
from optkit.batching import Batcher
from optkit.bench.arms import all_cores
from optkit.bench.interleave import EncodingArm
from optkit.engine.encoder import embed, vocabulary_of
from optkit.engine.pooling import pooling_of
from optkit.engine.tensors import TensorEngine, padded
from optkit.errors import DamagedError
from optkit.metrics import EncodingRun
from optkit.model import Model
from optkit.steps import Limits
from optkit.weights import sentence_files

__all__ = ["SessionEncodingArm", "TransformersEncodingArm"]

_BATCH_SIZE = 32


class TransformersEncodingArm(EncodingArm):
    """Batches of 32 sorted by length, longest first, through the transformers module, then pooling.

    What a user has before optimizing anything: `SentenceTransformer.encode` does this by default.
    """

    def __init__(self, model: Model, name: str) -> None:
        self.name = name
        self.model: Model | None = model
        self._pooling = pooling_of(model.files)

    def run(self, sequences: Sequence[tuple[int, ...]]) -> EncodingRun:
        import torch

        assert self.model is not None, "the arm is closed"
        module: Any = self.model.module
        with all_cores(), torch.inference_mode():
            begin = time.perf_counter()
            order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
            rows = [np.empty(0, np.float32)] * len(sequences)
            for start in range(0, len(order), _BATCH_SIZE):
                batch = order[start : start + _BATCH_SIZE]
                inputs = padded([sequences[index] for index in batch], ("input_ids", "attention_mask"))
                tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
                hidden = module(**tensors).last_hidden_state.float().numpy()
                for row, index in enumerate(batch):
                    rows[index] = self._pooling(hidden[row, : len(sequences[index])])
            seconds = time.perf_counter() - begin
        if not all(np.isfinite(row).all() for row in rows):
            raise DamagedError("the baseline gives NaN or infinite embeddings", remedy="check the model's files")
        return EncodingRun(len(rows), sum(map(len, sequences)), seconds)

    def close(self) -> None:
        self.model = None


class SessionEncodingArm(EncodingArm):
    """All sequences through the engine at once, over an open session of a backend. Closes the session.

    Args:
        session: nothing else may run in it meanwhile.
        batcher: the strategy of the recipe.
        weights: the folder whose files say how it pools.
        limits: that the session was opened for.
        name: of the arm.
    """

    def __init__(self, session: TensorSession, batcher: Batcher, weights: Path, limits: Limits, name: str) -> None:
        self.name = name
        self.session = session
        self.weights = weights
        self._batcher, self._limits = batcher, limits
        self._pooling, self._vocab_size = pooling_of(sentence_files(weights)), vocabulary_of(weights)

    def run(self, sequences: Sequence[tuple[int, ...]]) -> EncodingRun:
        with all_cores():
            begin = time.perf_counter()
            engine = TensorEngine(self.session, self._batcher, self._limits, self._vocab_size)
            rows = embed(engine, sequences, self._pooling)
            seconds = time.perf_counter() - begin
        return EncodingRun(len(rows), sum(map(len, sequences)), seconds)

    def close(self) -> None:
        self.session.close()
