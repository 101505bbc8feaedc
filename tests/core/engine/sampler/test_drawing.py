"""Draws follow the distribution that the filters leave, exactly, whichever way they are found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.engine import SamplingParams
from optkit.engine.sampler import drawing
from optkit.engine.sampler.drawing import Filters, draw
from optkit.engine.sampler.weights import block_weights

VOCAB, POINTS = 3001, 1000
# Evenly spread points: a token of probability p is met by p times their number, or one more or less.
SPREAD = (np.arange(POINTS) + 0.5) / POINTS

FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 40.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 700},
    {"top_k": VOCAB},
    {"top_k": 10**9, "top_p": 0.5},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"temperature": 40.0, "top_p": 0.7},
    {"min_p": 0.2},
    {"min_p": 0.001},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 500, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 40.0, "top_k": 600, "top_p": 0.9, "min_p": 0.01},
]


def filters(count: int, params: SamplingParams) -> Filters:
    one = params.temperature, params.top_k, params.top_p, params.min_p
    return Filters(*(np.full(count, value) for value in one))


def random_row(seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=vocab) * 3).astype(np.float32)


def frequencies(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    tokens = draw(np.tile(row, (POINTS, 1)), filters(POINTS, params), SPREAD)
    return np.bincount(tokens, minlength=len(row))


@pytest.mark.parametrize("given_filters", FILTERS, ids=str)
@pytest.mark.parametrize("way", ["likely tokens first", "sorting everything"])
def test_every_token_gets_its_share(distribution, monkeypatch, given_filters, way):
    if way == "sorting everything":
        monkeypatch.setattr(drawing, "_TRIES", ())
    params = SamplingParams(**{"temperature": 1.0} | given_filters)
    row = random_row()
    expected = distribution(row, params)
    found = frequencies(row, params)
    np.testing.assert_allclose(found, expected * POINTS, atol=1.01)
    assert not found[expected == 0].any()


@pytest.mark.parametrize("given_filters", [{"top_k": 300}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.5}])
@pytest.mark.parametrize("steps", [2.0, 0.5], ids=["many ties", "hundreds of ties"])
def test_ties_are_ranked_by_token_id(distribution, monkeypatch, given_filters, steps):
    params = SamplingParams(temperature=1.0, **given_filters)
    row = np.round(random_row() * steps) / np.float32(steps)
    expected, found = distribution(row, params), frequencies(row, params)
    # The last token of a nucleus is a matter of rounding where ties make it one of many that are alike.
    assert np.abs(found - expected * POINTS).sum() < POINTS / 50 + np.count_nonzero(expected)
    monkeypatch.setattr(drawing, "_TRIES", ())
    np.testing.assert_array_equal(frequencies(row, params), found)


def test_a_flat_row_is_drawn_by_token_id():
    row = np.zeros(VOCAB, dtype=np.float32)
    found = frequencies(row, SamplingParams(temperature=1.0, top_k=10))
    np.testing.assert_array_equal(found, [POINTS / 10] * 10 + [0] * (VOCAB - 10))


@pytest.mark.parametrize("given_filters", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_impossible_tokens_are_never_drawn(given_filters):
    row = np.full(VOCAB, -np.inf, dtype=np.float32)
    row[[300, 301, 2999]] = -2.0, -1.0, -1.5
    found = frequencies(row, SamplingParams(temperature=1.0, **given_filters))
    assert found[[300, 301, 2999]].sum() == POINTS
    assert found[301] > found[2999] > 0


@pytest.mark.parametrize("given_filters", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_the_ends_of_the_unit_interval_meet_possible_tokens(given_filters):
    row = np.full(600, -np.inf, dtype=np.float32)
    row[[1, 270]] = 0.0, 1.0
    ends = np.array([0.0, 1 - 2.0**-53])
    tokens = draw(np.tile(row, (2, 1)), filters(2, SamplingParams(temperature=1.0, **given_filters)), ends)
    assert sorted(tokens.tolist()) == [1, 270]


@pytest.mark.parametrize("temperature", [5e-324, 1e-20, 1.0])
@pytest.mark.parametrize("given_filters", [{}, {"top_p": 0.9}], ids=str)
def test_huge_logits_and_tiny_temperatures_do_not_overflow(temperature, given_filters):
    row = random_row()
    row[[5, 6]] = 3e38, -3e38
    params = SamplingParams(temperature=temperature, **given_filters)
    tokens = draw(np.tile(row, (3, 1)), filters(3, params), np.array([0, 0.5, 0.99]))
    assert tokens.tolist() == [5, 5, 5]


@pytest.mark.parametrize("given_filters", [{}, {"top_p": 0.9}], ids=str)
def test_a_huge_temperature_makes_all_tokens_alike(given_filters):
    found = frequencies(random_row(vocab=POINTS), SamplingParams(temperature=1e300, **given_filters))
    assert found.max() <= 2


def test_a_row_that_needs_sorting_leaves_the_others_alone(distribution):
    flat, steep = SamplingParams(temperature=40.0, top_p=0.9), SamplingParams(temperature=0.5, top_p=0.9)
    row = random_row(vocab=9000)
    points = np.array([0.3, 0.6])
    mixed = Filters(*(np.array(pair) for pair in zip((40.0, 0, 0.9, 0.0), (0.5, 0, 0.9, 0.0), strict=True)))
    together = draw(np.tile(row, (2, 1)), mixed, points)
    for place, params in enumerate((flat, steep)):
        order = np.argsort(-row, kind="stable")
        running = np.cumsum(distribution(row, params)[order])
        assert together[place] == order[np.searchsorted(running, points[place], side="right")]


@given(st.sampled_from([1, 7, 255, 256, 300, 1025]), st.integers(1, 9), st.integers(0, 1000))
def test_weights_are_the_same_to_the_last_bit_alone_and_in_a_batch(vocab, count, seed):
    logits = (np.random.default_rng(seed).normal(size=(count, vocab)) * 5).astype(np.float32)
    temperature = np.random.default_rng(seed).uniform(0.1, 2, size=count)
    together = block_weights(logits, temperature)
    for row in range(count):
        alone = block_weights(logits[row : row + 1], temperature[row : row + 1])
        for mine, ours in zip(alone, together, strict=True):
            np.testing.assert_array_equal(mine[0], ours[row])


def test_block_weights_are_the_softmax():
    logits = random_row().reshape(1, -1)
    weights, totals = block_weights(logits, np.array([0.7]))
    scaled = logits[0].astype(np.float64) / 0.7
    expected = np.exp(scaled - scaled.max())
    np.testing.assert_allclose(weights.ravel()[:VOCAB], expected, rtol=1e-5)
    np.testing.assert_allclose(totals[0, -1], expected.sum(), rtol=1e-6)
