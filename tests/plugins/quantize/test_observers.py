"""Observers against numpy on the whole data at once, and what they make of a layer's inputs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.blockwise import walk
from optkit.calibration import Calibration
from optkit.errors import OptkitError
from optkit.schemes import ActivationScheme
from optkit.transforms import TransformContext
from optkit_quantize.observers import Counts, Divergence, LeastSquares, MinMax, Percentile, input_scales

KINDS = ["normal", "outlier", "positive", "negative", "constant", "zero", "tiny", "shifted", "growing"]
BINS = 4096


def numbers(kind, seed, chunks, size):
    """Chunks of float32, each of a few numbers."""
    generator = np.random.default_rng(seed)
    data = generator.normal(size=(chunks, size))
    if kind == "outlier":
        data[-1, 0] = 1000
    elif kind == "positive":
        data = abs(data)
    elif kind == "negative":
        data = -abs(data)
    elif kind == "constant":
        data[:] = generator.normal()
    elif kind == "zero":
        data[:] = 0
    elif kind == "tiny":
        data *= 1e-20
    elif kind == "shifted":
        data += 100
    elif kind == "growing":
        data *= 10.0 ** np.arange(-3, chunks - 3)[:, None]
    return data.astype(np.float32)


DATA = st.builds(
    numbers, st.sampled_from(KINDS), st.integers(0, 2**16), chunks=st.integers(1, 6), size=st.integers(1, 400)
)


def seen(observer, data):
    for chunk in data:
        getattr(observer, "see", getattr(observer, "add", None))(torch.from_numpy(chunk))
    return observer


@settings(max_examples=40)
@given(DATA)
def test_counts_are_those_of_all_numbers_at_once(data):
    counts = seen(Counts(), data)
    values = data.astype(np.float64).ravel()
    assert (counts.low, counts.high) == (values.min(), values.max())
    bins, expected = np.unique(np.floor(values / counts.width), return_counts=True)
    middles, found = counts.centres()
    assert bins[-1] - bins[0] < BINS
    np.testing.assert_array_equal(middles, (bins + 0.5) * counts.width)
    np.testing.assert_array_equal(found, expected)
    magnitudes = np.where(bins < 0, -1 - bins, bins).astype(int)
    wanted = np.zeros(magnitudes.max() + 1)
    np.add.at(wanted, magnitudes, expected)
    np.testing.assert_array_equal(counts.magnitudes(), wanted)


@settings(max_examples=10)
@given(st.integers(0, 2**16))
def test_bins_stay_narrow(seed):
    counts = seen(Counts(), numbers("normal", seed, 4, 200))
    assert counts.high - counts.low > BINS / 4 * counts.width


@settings(max_examples=40)
@given(DATA)
def test_minmax(data):
    assert seen(MinMax(), data).range() == (data.min(), data.max())


@settings(max_examples=40)
@given(DATA, st.sampled_from([50.0, 75.0, 99.0, 99.9, 100.0]))
def test_percentile(data, percentile):
    observer = seen(Percentile(percentile), data)
    values, width = np.sort(data.astype(np.float64).ravel()), observer._seen.width
    for found, share in zip(observer.range(), (1 - percentile / 100, percentile / 100), strict=True):
        place = share * len(values)
        lower, upper = max(math.floor(place + 1e-9) - 1, 0), min(math.ceil(place - 1e-9), len(values) - 1)
        assert values[lower] - width <= found <= values[upper] + width
    if percentile == 100:
        assert observer.range() == (values[0], values[-1])


def lost(magnitudes, count, levels=128):
    """KL divergence, one bin at a time."""
    kept = [float(n) for n in magnitudes[:count]]
    reference = list(kept)
    reference[-1] += sum(magnitudes[count:])
    levels = min(levels, count)
    edges = [level * count // levels for level in range(levels)] + [count]
    made = [0.0] * count
    for start, end in pairwise(edges):
        used = [place for place in range(start, end) if reference[place] > 0]
        for place in used:
            made[place] = sum(kept[start:end]) / len(used)
    if any(made[place] == 0 for place in range(count) if reference[place] > 0):
        return math.inf
    all_p, all_q = sum(reference), sum(made)
    return sum(p / all_p * math.log((p / all_p) / (q / all_q)) for p, q in zip(reference, made, strict=True) if p > 0)


@settings(max_examples=4)
@given(st.sampled_from(["normal", "outlier", "positive", "constant", "zero"]), st.integers(0, 2**16))
def test_divergence(kind, seed):
    data = numbers(kind, seed, 2, 500)
    low, high = seen(Divergence(), data).range()
    counts = seen(Counts(), data)
    magnitudes = counts.magnitudes()
    candidates = [*range(128, len(magnitudes), 16), len(magnitudes)]
    found = max(-low, high)
    losses = {count * counts.width: lost(magnitudes, count) for count in candidates}
    covered = [loss for threshold, loss in losses.items() if threshold >= found]
    assert min(covered) <= min(losses.values()) + 1e-9
    assert data.min() <= low <= high <= data.max()


def test_divergence_cuts_off_a_rare_outlier_and_keeps_a_flat_distribution():
    data = np.random.default_rng(0).normal(size=(10, 5000)).astype(np.float32)
    data[3, 3] = 60
    assert 3 < seen(Divergence(), data).range()[1] < 12
    flat = np.linspace(-1, 1, 20001, dtype=np.float32)[None]
    low, high = seen(Divergence(), flat).range()
    assert -1 <= low < -0.95
    assert 0.95 < high <= 1


def squared_error(values, low, high, symmetric):
    """Of all numbers themselves, rounded to 8 bits."""
    scale = 2 * high / 255 if symmetric else (high - low) / 255
    scale = scale or 1.0
    zero = 0 if symmetric else np.clip(np.round(-128 - low / scale), -128, 127)
    rounded = (np.clip(np.round(values / scale + zero), -128, 127) - zero) * scale
    return float(((rounded - values) ** 2).sum())


@settings(max_examples=20)
@given(DATA, st.booleans())
def test_least_squares(data, symmetric):
    observer = seen(LeastSquares(symmetric=symmetric), data)
    low, high = observer.range()
    values = data.astype(np.float64).ravel()
    found = squared_error(values, low, high, symmetric)
    # A number is at most half a bin from where it was counted.
    slack = 2 * (math.sqrt(len(values)) * observer._seen.width + 1e-30)
    shrunk = [2 ** (-step / 8) for step in range(64)]
    if symmetric:
        assert low == -high
        tried = [squared_error(values, -abs(values).max() * s, abs(values).max() * s, True) for s in shrunk]
    else:
        least, most = min(values.min(), 0), max(values.max(), 0)
        assert least <= low <= 0 <= high <= most
        tried = [squared_error(values, least * s, high, False) for s in shrunk]
        tried += [squared_error(values, low, most * s, False) for s in shrunk]
        tried += [squared_error(values, least, most, False)]
    assert math.sqrt(found) <= math.sqrt(min(tried)) + slack


def test_ranges_of_normal_numbers_with_an_outlier():
    data = np.random.default_rng(0).normal(size=(20, 5000)).astype(np.float32)
    data[0, 0] = 30
    ends = {
        "minmax": seen(MinMax(), data).range()[1],
        "mse": seen(LeastSquares(symmetric=True), data).range()[1],
        "percentile": seen(Percentile(99.99), data).range()[1],
    }
    assert ends["minmax"] == 30
    assert 3 < ends["percentile"] < ends["mse"] < 30


# --- layers


def calibrated(model, scheme, observer, names, inputs=None):
    batch = {"input_ids": torch.arange(3, 40)[None], "attention_mask": torch.ones(1, 37, dtype=torch.long)}
    context = TransformContext(lambda *_: None, Calibration((inputs or batch,)))
    return {
        name: scale
        for block in walk(model.module, context, names)
        for name, scale in input_scales(block, scheme, observer).items()
    }


@pytest.mark.parametrize(
    ("scheme", "steps", "zero_point"),
    [
        (ActivationScheme(False, symmetric=True), 127.5, False),
        (ActivationScheme(False, symmetric=False), 255, True),
        (ActivationScheme(False, type="float"), 448, False),
    ],
    ids=str,
)
def test_scales_are_those_of_what_each_layer_gets(tiny_llama, scheme, steps, zero_point):
    model = tiny_llama()
    names = [f"model.layers.{i}.mlp.{kind}_proj" for i in (0, 1) for kind in ("up", "down")] + ["lm_head"]
    inputs = {}
    for name in names:
        layer = model.module.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].double().numpy()}))
    scales = calibrated(model, scheme, MinMax, names)
    model.module(input_ids=torch.arange(3, 40)[None])
    assert list(scales) == names
    for name, (scale, zero) in scales.items():
        low, high = min(inputs[name].min(), 0), max(inputs[name].max(), 0)
        wanted = (high - low) / 255 if zero_point else max(-low, high) / steps
        np.testing.assert_allclose(scale.numpy(), [wanted], rtol=1e-5)
        assert (scale.dtype, zero is not None) == (torch.float32, zero_point)
        if zero is not None:
            assert zero.dtype == torch.int8
            assert abs(zero.item() - (-128 - low / wanted)) <= 0.51


def test_inputs_that_are_not_finite_are_named(tiny_llama):
    model = tiny_llama()
    model.module.model.embed_tokens.weight[5, 3] = float("nan")
    with pytest.raises(OptkitError, match=r"^model\.layers\.0\.self_attn\.q_proj: gets NaN or infinite inputs"):
        calibrated(model, ActivationScheme(False), MinMax, ["model.layers.0.self_attn.q_proj"])


def test_a_layer_that_is_never_run_is_named(tiny_llama):
    model = tiny_llama()
    model.module.spare = torch.nn.Linear(64, 64)
    with pytest.raises(OptkitError, match=r"^spare: is not run on the calibration data; add it to ignore"):
        calibrated(model, ActivationScheme(False), MinMax, ["spare"])
