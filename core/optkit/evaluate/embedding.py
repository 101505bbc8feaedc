"""Encoders beside the baseline: what gives embeddings, and how far apart they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from optkit.backends import TensorSession
from optkit.engine.pooling import Pooling, pooling_of
from optkit.engine.tensors import OUTPUT, padded
from optkit.errors import DamagedError, GateFailed
from optkit.evaluate.judge import Quality, distance, figure_of
from optkit.metrics import EmbeddingMetric
from optkit.model import Model
from optkit.weights import sentence_files

__all__ = [
    "Embedder",
    "ModelEmbedder",
    "RecordedEmbedder",
    "SessionEmbedder",
    "embedding_parity",
    "evaluate_embeddings",
]

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]


class Embedder(ABC):
    """An encoder that can be asked for a sequence's embedding."""

    pooling: Pooling

    @abstractmethod
    def hidden(self, sequences: Sequence[tuple[int, ...]]) -> list[Floats]:
        """The last layer's output for each sequence, `[tokens, hidden]` float32."""

    def embed(self, sequence: tuple[int, ...]) -> Floats:
        """`[hidden]` float32, pooled and normalized as the model's files say."""
        [hidden] = self.hidden([sequence])
        return self.pooling(hidden)


class ModelEmbedder(Embedder):
    """An encoder of transformers, each sequence alone and without padding."""

    def __init__(self, model: Model) -> None:
        self.pooling = pooling_of(model.files)
        self._module: Any = model.module

    def hidden(self, sequences: Sequence[tuple[int, ...]]) -> list[Floats]:
        import torch

        with torch.inference_mode():
            return [
                self._module(input_ids=torch.tensor([ids])).last_hidden_state[0].float().numpy() for ids in sequences
            ]


class SessionEmbedder(Embedder):
    """An open session, the sequences of one call padded to the longest.

    Args:
        session: of an encoder; stays open.
        weights: the folder whose files say how it pools.
    """

    def __init__(self, session: TensorSession, weights: Path) -> None:
        self.pooling = pooling_of(sentence_files(weights))
        self._session = session

    def hidden(self, sequences: Sequence[tuple[int, ...]]) -> list[Floats]:
        outputs = self._session.run(padded(sequences, self._session.inputs))[OUTPUT]
        return [row[: len(ids)].astype(np.float32, copy=False) for row, ids in zip(outputs, sequences, strict=True)]


class RecordedEmbedder(Embedder):
    """An embedder asked once for each sequence's embedding, so that many candidates are judged by them."""

    def __init__(self, embedder: Embedder) -> None:
        self.pooling = embedder.pooling
        self._embedder = embedder
        self._known: dict[tuple[int, ...], Floats] = {}

    def hidden(self, sequences: Sequence[tuple[int, ...]]) -> list[Floats]:
        return self._embedder.hidden(sequences)

    def embed(self, sequence: tuple[int, ...]) -> Floats:
        if sequence not in self._known:
            self._known[sequence] = self._embedder.embed(sequence)
        return self._known[sequence]


def evaluate_embeddings(
    baseline: Embedder,
    candidate: Embedder,
    sequences: Sequence[tuple[int, ...]],
    metrics: Mapping[str, EmbeddingMetric],
    progress: Progress,
) -> Quality:
    """Judge a candidate by its embeddings.

    Args:
        baseline: the unoptimized model.
        candidate: the model that is judged, with the same vocabulary and width.
        sequences: token ids, at least one sequence.
        metrics: by name.
        progress: `progress(done, total, what)` after each sequence.

    Raises:
        GateFailed: the candidate gives NaN, infinite or misshapen embeddings.
        DamagedError: the baseline gives NaN or infinite embeddings.
    """
    expected, found = [], []
    progress(0, len(sequences), "sequences")
    for done, ids in enumerate(sequences, 1):
        expected.append(baseline.embed(ids))
        found.append(candidate.embed(ids))
        _check(expected[-1], found[-1])
        progress(done, len(sequences), "sequences")
    before, after = np.stack(expected), np.stack(found)
    figures = {
        name: figure_of(
            metric,
            np.split(metric.per_sequence(before, before), len(before)),
            np.split(metric.per_sequence(after, before), len(after)),
        )
        for name, metric in metrics.items()
    }
    return Quality(len(sequences), sum(map(len, sequences)), figures)


def embedding_parity(reference: Embedder, candidate: Embedder, sequences: Sequence[tuple[int, ...]]) -> float:
    """Distance of two embedders that should be the same model: the largest `|a - b| / |a|` of a sequence.

    It compares every token's output before pooling, and the candidate gets the sequences in one call, so that padding
    that reaches a shorter one shows. To be held against `optkit.backends.Lowering.tolerance`.

    Raises:
        GateFailed, DamagedError: see `evaluate_embeddings`.
    """
    pairs = list(zip(reference.hidden(sequences), candidate.hidden(sequences), strict=True))
    for expected, found in pairs:
        _check(expected, found)
    return max(distance(expected, found) for expected, found in pairs)


def _check(expected: Floats, found: Floats) -> None:
    if not np.isfinite(expected).all():
        raise DamagedError("the baseline gives NaN or infinite embeddings", remedy="check the model's files")
    if found.shape != expected.shape:
        raise GateFailed(
            f"the model gives embeddings of another shape than the baseline's {expected.shape}", found=found.shape
        )
    if not np.isfinite(found).all():
        raise GateFailed("the model gives NaN or infinite embeddings", remedy="remove the transform that broke it")
