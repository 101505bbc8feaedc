"""Log probabilities against a float64 softmax."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.engine.sampler import finite_rows, likeliest_tokens, score


def reference(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("vocab", [5, 320, 4099])
def test_scores_are_the_log_softmax_and_its_largest_entries(vocab):
    generator = np.random.default_rng(1)
    logits = (generator.normal(size=(300, vocab)) * 4).astype(np.float32)
    targets = generator.integers(0, vocab, size=300).tolist()
    expected = reference(logits)
    found = score(logits, targets, 3)
    assert [one.token for one in found] == targets
    np.testing.assert_allclose([one.logprob for one in found], expected[np.arange(300), targets], atol=1e-5)
    order = np.argsort(-expected, axis=1)[:, :3]
    assert [[token for token, _ in one.top] for one in found] == order.tolist()
    np.testing.assert_allclose(
        [[value for _, value in one.top] for one in found], np.take_along_axis(expected, order, axis=1), atol=1e-5
    )


def test_no_top_tokens_are_given_unless_asked_for():
    assert score(np.zeros((1, 4), dtype=np.float32), [2], 0)[0].top == ()


def test_ties_come_in_the_order_of_their_ids_and_impossible_tokens_not_at_all():
    logits = np.array([[1, 2, 2, -np.inf, 2]], dtype=np.float32)
    assert [token for token, _ in score(logits, [1], 2)[0].top] == [1, 2]
    assert [token for token, _ in score(logits, [1], 5)[0].top] == [1, 2, 4, 0]
    assert score(logits, [3], 0)[0].logprob == -np.inf


def test_huge_logits_do_not_overflow():
    (found,) = score(np.array([[1e30, 0, -1e30]], dtype=np.float32), [0], 1)
    assert found.logprob == 0


def test_rows_with_nan_or_infinity_cannot_be_sampled():
    logits = np.zeros((5, 4), dtype=np.float32)
    logits[1, 2], logits[2, 0], logits[3], logits[4, 1] = np.nan, np.inf, -np.inf, -np.inf
    assert finite_rows(logits, likeliest_tokens(logits)) == [True, False, False, False, True]
