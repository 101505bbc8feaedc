"""Intervals cover what they claim to, and verdicts follow from them alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.bench import Estimate, median_ratio, verdict

log_ratios = st.lists(st.floats(-3, 3), min_size=1, max_size=30)


@pytest.mark.parametrize("blocks", [6, 10, 20])
def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says(blocks):
    random = np.random.default_rng(1)
    true, trials = math.log(1.7), 300
    covered = 0
    for _ in range(trials):
        # Student's t: machines are quiet mostly and far off now and then.
        found = median_ratio(true + 0.1 * random.standard_t(3, size=blocks), resamples=1000)
        covered += found.low <= 1.7 <= found.high
    # Of 300 trials at 93 to 98%, fewer than 265 or all 300 happen less than once in a thousand.
    assert 265 <= covered < 300


def test_more_blocks_narrow_the_interval():
    random = np.random.default_rng(2)
    widths = []
    for blocks in (6, 24, 96, 384):
        found = [median_ratio(0.1 * random.normal(size=blocks), resamples=1000) for _ in range(30)]
        widths.append(np.mean([estimate.high - estimate.low for estimate in found]))
    assert widths == sorted(widths, reverse=True)
    # Four times the blocks, half the width.
    assert 0.35 < widths[3] / widths[2] < 0.65


@given(log_ratios)
def test_the_interval_holds_the_median_and_stays_within_the_blocks(values):
    found = median_ratio(values, resamples=2000)
    assert found.low <= found.value * (1 + 1e-12)
    assert found.value <= found.high * (1 + 1e-12)
    assert math.exp(min(values)) * (1 - 1e-12) <= found.low
    assert found.high <= math.exp(max(values)) * (1 + 1e-12)


@given(log_ratios)
def test_swapping_the_arms_inverts_ratio_and_interval(values):
    one, other = median_ratio(values, resamples=500), median_ratio([-value for value in values], resamples=500)
    assert other.value == pytest.approx(1 / one.value)
    assert other.low == pytest.approx(1 / one.high)
    assert other.high == pytest.approx(1 / one.low)


@given(log_ratios, st.floats(0, 2))
def test_a_faster_arm_never_gets_a_smaller_ratio(values, more):
    slow, fast = median_ratio(values, resamples=500), median_ratio([value + more for value in values], resamples=500)
    for before, after in ((slow.value, fast.value), (slow.low, fast.low), (slow.high, fast.high)):
        assert after == pytest.approx(before * math.exp(more))


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(3).normal(size=7)
    assert median_ratio(values, seed=5) == median_ratio(values, seed=5)


@pytest.mark.parametrize("values", [[], [math.nan, 0.0], [math.inf]])
def test_what_is_no_ratio_is_refused(values):
    with pytest.raises(ValueError, match="log ratios"):
        median_ratio(values)


@pytest.mark.parametrize(
    ("low", "high", "noise", "expected"),
    [
        (1.30, 1.60, None, "better"),
        (0.50, 0.80, None, "worse"),
        (0.97, 1.04, None, "equivalent"),
        (1.01, 1.04, None, "equivalent"),  # faster for certain, and too little to matter
        (0.90, 1.20, None, "inconclusive"),
        (1.02, 1.20, None, "better"),
        (1.02, 1.20, (0.97, 1.01), "inconclusive"),  # the machine alone makes 3%
        (1.04, 1.20, (0.97, 1.01), "better"),
        (0.80, 0.98, (0.99, 1.03), "inconclusive"),
        (0.80, 0.96, (0.99, 1.03), "worse"),
        (1.06, 1.06, None, "better"),
        (1.049, 1.049, None, "equivalent"),
        (1.00, 1.00, (0.5, 2.0), "equivalent"),
    ],
)
def test_verdicts(low, high, noise, expected):
    ratio = Estimate(math.sqrt(low * high), low, high)
    floor = None if noise is None else Estimate(1.0, *noise)
    assert verdict(ratio, "higher", 0.05, floor) == expected
    opposite = {"better": "worse", "worse": "better"}
    assert verdict(ratio, "lower", 0.05, floor) == opposite.get(expected, expected)


@given(
    st.floats(0.2, 5),
    st.floats(1, 2),
    st.floats(1, 2),
    st.floats(0, 0.5),
    st.floats(1, 1.5),
    st.sampled_from(["higher", "lower"]),
)
def test_swapping_the_arms_swaps_the_verdict(value, below, above, margin, noise, better):
    # Away from the exact edges, where 1 / (1 / x) may fall on the other side.
    edges = [math.log1p(margin), -math.log1p(margin), math.log(noise), -math.log(noise)]
    bounds = [math.log(value / below), math.log(value * above)]
    if any(abs(bound - edge) < 1e-9 for bound in bounds for edge in edges):
        return
    floor = Estimate(1.0, 1 / noise, noise)
    one = verdict(Estimate(value, value / below, value * above), better, margin, floor)
    other = verdict(Estimate(1 / value, 1 / value / above, below / value), better, margin, floor)
    assert other == {"better": "worse", "worse": "better"}.get(one, one)
