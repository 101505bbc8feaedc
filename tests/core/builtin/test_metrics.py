"""The metrics against definitions written out in float64, and against cases that a reader can check in the head."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.builtin.quality import KLDivergence, KLDivergenceP99, Perplexity, Top1Agreement
from optkit.builtin.speed import (
    DecodeTokensPerSecond,
    Latency,
    PeakMemory,
    PrefillTokensPerSecond,
    Size,
    TimePerOutputToken,
    TimeToFirstToken,
)
from optkit.metrics import Footprint, Metric, Run
from optkit.plugins import Plugins


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


@st.composite
def predictions(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions, vocabulary = draw(st.integers(1, 40)), draw(st.integers(2, 300))
    spread, offset = draw(st.sampled_from([0.1, 3.0, 30.0])), draw(st.sampled_from([0.0, -500.0, 2000.0]))
    baseline = (random.normal(size=(positions, vocabulary)) * spread + offset).astype(np.float32)
    noise = draw(st.sampled_from([1e-3, 0.5, 10.0]))
    logits = (baseline + random.normal(size=baseline.shape) * noise).astype(np.float32)
    return logits, baseline, random.integers(vocabulary, size=positions)


@given(predictions())
def test_perplexity_is_its_definition_in_float64(case):
    logits, baseline, targets = case
    expected = -log_softmax(logits)[np.arange(len(targets)), targets]
    values = Perplexity().per_token(logits, baseline, targets)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
    assert Perplexity().aggregate(values) == pytest.approx(math.exp(expected.mean()), rel=1e-5)


@given(predictions())
def test_kl_is_its_definition_in_float64(case):
    logits, baseline, targets = case
    p, q = log_softmax(baseline), log_softmax(logits)
    expected = np.sum(np.exp(p) * (p - q), axis=-1)
    values = KLDivergence().per_token(logits, baseline, targets)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-10)
    assert (values >= 0).all()
    assert KLDivergence().aggregate(values) == pytest.approx(expected.mean(), rel=1e-5, abs=1e-10)
    assert KLDivergenceP99().aggregate(values) == pytest.approx(np.quantile(expected, 0.99), rel=1e-5, abs=1e-10)


@given(predictions(), st.floats(-50, 50, width=16))
def test_a_constant_added_to_all_logits_changes_no_metric(case, constant):
    logits, baseline, targets = case
    # Rounded to 2**-6, the shifted logits are exact in float32, and so must the metrics be equal.
    logits, baseline = np.round(logits * 64) / 64, np.round(baseline * 64) / 64
    constant = np.float32(np.round(constant * 64) / 64)
    for metric in (Perplexity(), KLDivergence(), Top1Agreement()):
        one = metric.per_token(logits, baseline, targets)
        np.testing.assert_allclose(metric.per_token(logits + constant, baseline, targets), one, rtol=1e-5, atol=1e-6)


@given(predictions())
def test_equal_logits_diverge_by_exactly_nothing(case):
    _, baseline, targets = case
    same = baseline.copy()
    for metric in (KLDivergence(), KLDivergenceP99()):
        assert not metric.per_token(same, baseline, targets).any()
        assert not metric.per_token(baseline, baseline, targets).any()
    assert Top1Agreement().aggregate(Top1Agreement().per_token(same, baseline, targets)) == 1


def test_perplexity_of_even_odds_is_their_number():
    logits = np.zeros((3, 8), np.float32)
    values = Perplexity().per_token(logits, logits, np.array([0, 5, 7]))
    assert Perplexity().aggregate(values) == pytest.approx(8)


def test_kl_of_a_coin_from_a_loaded_coin():
    fair, loaded = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.9, 0.1]]).astype(np.float32)
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert KLDivergence().per_token(loaded, fair, np.array([0]))[0] == pytest.approx(expected, rel=1e-6)


def test_top1_agreement_counts_positions():
    baseline = np.array([[0, 1], [0, 1], [1, 0], [1, 0]], np.float32)
    logits = np.array([[0, 2], [3, 1], [5, 0], [2, 1]], np.float32)
    assert Top1Agreement().aggregate(Top1Agreement().per_token(logits, baseline, np.zeros(4, np.int64))) == 0.75


def test_many_positions_keep_their_digits():
    # A float32 sum of 4 million values of 0.1 is off in the third digit.
    values = np.full(4_000_000, 0.1, np.float32)
    assert KLDivergence().aggregate(values) == pytest.approx(np.float64(np.float32(0.1)), rel=1e-12)


RUN = Run(prompt_tokens=20, token_seconds=(0.5, 0.6, 0.8, 1.1), output=(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (DecodeTokensPerSecond(), 5.0),
        (PrefillTokensPerSecond(), 40.0),
        (TimeToFirstToken(), 500.0),
        (TimePerOutputToken(), 200.0),
        (Latency(), 1.1),
    ],
)
def test_speed_of_a_run(metric, expected):
    assert metric.of(RUN) == pytest.approx(expected)


def test_one_token_has_no_decode_speed():
    single = Run(20, (0.5,), (1,))
    assert math.isnan(DecodeTokensPerSecond().of(single))
    assert math.isnan(TimePerOutputToken().of(single))
    assert Latency().of(single) == 0.5


def test_footprint():
    footprint = Footprint(disk_bytes=10, peak_memory_bytes=300)
    assert (Size().of(footprint), PeakMemory().of(footprint)) == (10.0, 300.0)


def test_every_registered_metric_has_unit_and_direction():
    plugins = Plugins.load(third_party=False)
    names = plugins.names("metric")
    assert {"perplexity", "kl", "kl_p99", "top1_agreement", "decode_tokens_per_second", "size_bytes"} <= set(names)
    for name in names:
        metric = plugins.get("metric", name)()
        assert isinstance(metric, Metric)
        assert isinstance(metric.unit, str)
        assert metric.better in ("higher", "lower")
