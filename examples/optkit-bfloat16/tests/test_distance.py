"""The distance, against its definition and its bounds."""

import numpy as np
import pytest
from optkit_bfloat16.distance import TotalVariation

NOWHERE = np.zeros(0, np.int64)


def distance(one, other):
    values = TotalVariation().per_token(np.log(np.float32(one)), np.log(np.float32(other)), NOWHERE)
    assert values.dtype == np.float32
    return values.tolist()


def test_known_distributions():
    assert distance([[0.5, 0.5]], [[0.5, 0.5]]) == [0]
    assert distance([[0.5, 0.25, 0.25]], [[0.25, 0.25, 0.5]]) == pytest.approx([0.25])
    assert distance([[0.9, 0.1], [0.4, 0.6]], [[0.1, 0.9], [0.5, 0.5]]) == pytest.approx([0.8, 0.1])


def test_it_is_what_speculative_sampling_rejects():
    generator = np.random.default_rng(0)
    one, other = (generator.normal(size=(5, 40)).astype(np.float32) for _ in range(2))
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (one, other))
    values = TotalVariation().per_token(one, other, NOWHERE)
    assert values == pytest.approx(1 - np.minimum(p, q).sum(-1), rel=1e-6)
    assert TotalVariation().aggregate(values) == pytest.approx(values.mean())


def test_large_logits_neither_overflow_nor_leave_the_range():
    one, other = np.float32([[3e4, 0, -3e4]]), np.float32([[0, 3e4, -3e4]])
    assert TotalVariation().per_token(one, other, NOWHERE) == 1
    assert TotalVariation().per_token(one, one + np.float32(64), NOWHERE) == 0
