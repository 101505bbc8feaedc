"""Encoders are judged by their embeddings: exactly alike is 1, and what is broken is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optkit.builtin.quality import EmbeddingCosine, EmbeddingCosineP01
from optkit.engine.pooling import Pooling
from optkit.errors import DamagedError, GateFailed
from optkit.evaluate import (
    Embedder,
    ModelEmbedder,
    RecordedEmbedder,
    SessionEmbedder,
    embedding_parity,
    evaluate_embeddings,
)
from optkit.steps import Limits
from optkit_backends.torch import Torch

RANDOM = np.random.default_rng(0)
SEQUENCES = [tuple(RANDOM.integers(10, 300, size=RANDOM.integers(1, 60)).tolist()) for _ in range(20)]
METRICS = {"cosine": EmbeddingCosine(), "p01": EmbeddingCosineP01()}


def quiet(*_):
    pass


class Fixed(Embedder):
    """Embeddings by sequence."""

    def __init__(self, rows):
        self.pooling, self._rows, self.asked = Pooling(), rows, []

    def hidden(self, sequences):
        self.asked += sequences
        return [np.array([self._rows[ids]], np.float32) for ids in sequences]


def test_a_model_beside_itself_is_one(tiny_bert):
    found = evaluate_embeddings(ModelEmbedder(tiny_bert()), ModelEmbedder(tiny_bert()), SEQUENCES, METRICS, quiet)
    assert (found.windows, found.tokens) == (20, sum(map(len, SEQUENCES)))
    for figure in found.metrics.values():
        assert (figure.baseline, figure.value, figure.ratio) == (1, 1, None)
        assert (figure.interval.low, figure.interval.high) == (1, 1)


def test_figures_are_those_of_float64(tiny_bert):
    baseline, candidate = ModelEmbedder(tiny_bert()), tiny_bert()
    with torch.no_grad():
        candidate.module.encoder.layer[0].output.dense.weight[::2] *= -1
    judged = ModelEmbedder(candidate)
    found = evaluate_embeddings(baseline, judged, SEQUENCES, METRICS, quiet).metrics
    one, other = (np.stack([e.embed(ids) for ids in SEQUENCES]).astype(np.float64) for e in (baseline, judged))
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert found["cosine"].value == pytest.approx(cosines.mean(), abs=1e-6)
    assert found["p01"].value == pytest.approx(np.quantile(cosines, 0.01), abs=1e-6)
    assert found["p01"].value < found["cosine"].value < 0.999
    interval = found["cosine"].interval
    assert interval.low < interval.value < interval.high


def test_opposite_and_orthogonal_embeddings():
    sequences = [(1,), (2,), (3,), (4,)]
    before = Fixed({(1,): [1, 0], (2,): [0, 2], (3,): [3, 3], (4,): [1, 0]})
    after = Fixed({(1,): [0, 5], (2,): [0, -1], (3,): [1, 1], (4,): [9, 0]})
    assert evaluate_embeddings(before, after, sequences, METRICS, quiet).metrics["cosine"].value == pytest.approx(0.25)


def test_a_session_is_the_model_it_was_made_from(tiny_bert, tiny_encoder, tmp_path):
    reference = ModelEmbedder(tiny_bert())
    with Torch().open(tmp_path, tiny_encoder, Limits(4, 64)) as session:
        candidate = SessionEmbedder(session, tiny_encoder)
        assert candidate.pooling == reference.pooling == Pooling(("mean",), normalize=True)
        assert embedding_parity(reference, candidate, SEQUENCES) < 1e-5
        for ids in SEQUENCES[:3]:
            np.testing.assert_allclose(candidate.embed(ids), reference.embed(ids), atol=1e-6)


def test_parity_shows_padding_that_reaches_a_shorter_sequence(tiny_bert, tiny_encoder, tmp_path):
    class Leaking(SessionEmbedder):
        def hidden(self, sequences):
            widest = max(map(len, sequences))
            filled = [ids + (0,) * (widest - len(ids)) for ids in sequences]
            return [row[: len(ids)] for row, ids in zip(super().hidden(filled), sequences, strict=True)]

    with Torch().open(tmp_path, tiny_encoder, Limits(4, 64)) as session:
        assert embedding_parity(ModelEmbedder(tiny_bert()), Leaking(session, tiny_encoder), SEQUENCES) > 1e-2


def test_the_baseline_is_asked_once():
    inner = Fixed({(1,): [1, 0], (2,): [0, 1]})
    recorded = RecordedEmbedder(inner)
    for _ in range(2):
        assert [recorded.embed(ids).tolist() for ids in ((1,), (2,))] == [[1, 0], [0, 1]]
    assert inner.asked == [(1,), (2,)]


@pytest.mark.parametrize(
    ("before", "after", "kind", "words"),
    [
        ([1, 0], [1, np.nan], GateFailed, "NaN or infinite embeddings; remove the transform"),
        ([1, 0], [1, np.inf], GateFailed, "NaN or infinite embeddings; remove the transform"),
        ([1, 0], [1, 0, 0], GateFailed, r"another shape than the baseline's \(2,\), found \(3,\)"),
        ([1, np.nan], [1, 0], DamagedError, "the baseline gives NaN"),
    ],
)
def test_what_is_broken_is_refused(before, after, kind, words):
    with pytest.raises(kind, match=words):
        evaluate_embeddings(Fixed({(1,): before}), Fixed({(1,): after}), [(1,)], METRICS, quiet)
