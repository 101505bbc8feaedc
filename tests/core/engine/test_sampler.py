"""Sampling follows the distribution that its parameters describe."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.engine import SamplingParams
from optkit.engine.sampler import sample

LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32))


def frequencies(draws: int = 4000, **params: float) -> np.ndarray:
    wish = SamplingParams(seed=3, **params)
    tokens = [sample(LOGITS, [wish], [position])[0] for position in range(draws)]
    return np.bincount(tokens, minlength=4) / draws


def test_greedy_takes_the_largest():
    assert sample(np.array([[0, 2, 1], [5, 2, 1]], dtype=np.float32), [SamplingParams()] * 2, [0, 0]) == [1, 0]


def test_temperature_one_follows_the_softmax():
    # Four standard errors of a frequency over 4000 draws.
    np.testing.assert_allclose(frequencies(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.032)


def test_temperature_sharpens():
    expected = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), expected / expected.sum(), atol=0.032)


def test_the_nucleus_keeps_the_token_that_crosses_the_threshold():
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.7), [0.625, 0.375, 0, 0], atol=0.032)
    assert frequencies(draws=200, temperature=1.0, top_p=0.5)[0] == 1.0


def test_huge_logits_do_not_overflow():
    assert sample(np.array([[1e30, 0.0]], dtype=np.float32), [SamplingParams(temperature=1.0)], [0]) == [0]


@pytest.mark.parametrize("params", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_parameters_are_refused(params):
    with pytest.raises(ValueError, match="max_tokens is at least 1"):
        SamplingParams(**params)
