"""The most likely tokens are found exactly, however they are found."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.engine.sampler.candidates import most_likely

VOCAB = 5003  # a prime: the groups do not divide it


def rows(count: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, VOCAB)).astype(np.float32)


@pytest.mark.parametrize("wanted", [1, 40, 256, 600, VOCAB])
def test_all_tokens_down_to_the_wanted_rank_are_there(wanted):
    logits = rows()
    found = most_likely(logits, wanted)
    for row, values in enumerate(logits):
        tokens = found.tokens[row, : found.numbers[row]]
        assert len(tokens) >= wanted
        assert (np.diff(tokens) > 0).all()
        assert set(np.argsort(-values)[:wanted]) <= set(tokens.tolist())
        np.testing.assert_array_equal(found.logits[row, : len(tokens)], values[tokens])
        assert values[tokens].min() > np.delete(values, tokens).max(initial=-np.inf)
        assert (found.logits[row, len(tokens) :] == -np.inf).all()


def test_few_candidates_come_of_a_large_vocabulary():
    found = most_likely(rows(), 256)
    assert not found.complete.any()
    assert found.numbers.max() < 2 * 256


def test_a_row_with_few_possible_tokens_is_complete():
    logits = rows()
    logits[1] = -np.inf
    logits[1, [7, 4999]] = 3.0, -1.0
    found = most_likely(logits, 256)
    assert found.complete.tolist() == [False, True, False, False]
    assert found.tokens[1, :2].tolist() == [7, 4999]
    assert found.numbers[1] == 2


def test_ties_all_come_out_unless_they_pass_the_limit():
    logits = rows()
    logits[2] = 1.5
    assert most_likely(logits, 256).numbers[2] == VOCAB
    limited = most_likely(logits, 256, limit=1024)
    assert limited.numbers[2] == 0
    assert limited.tokens.shape[1] < 1024
    np.testing.assert_array_equal(limited.numbers[[0, 1, 3]], most_likely(logits[[0, 1, 3]], 256).numbers)
