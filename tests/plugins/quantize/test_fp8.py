"""quantize.fp8 against E4M3 numbers made by hand from their bits."""

from __future__ import annotations

import bisect
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.calibration import Calibration
from optkit.errors import OptkitError
from optkit.quantized import ActivationScheme, WeightScheme, quantized_layers, round_activations
from optkit.transforms import TransformContext
from optkit_quantize.fp8 import FP8
from optkit_quantize.rounding import round_weight

TOKENS = torch.arange(3, 40)[None]
CONTEXT = TransformContext(
    lambda *_: None, Calibration(({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)},))
)


def number(byte):
    """What seven bits stand for: four of exponent, biased by 7, and three of mantissa; 127 is NaN."""
    exponent, mantissa = byte >> 3, byte & 7
    return 2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)


NUMBERS = [number(byte) for byte in range(127)]


def nearest(value):
    """The byte of the closest positive number, of two equally close ones the even byte."""
    above = min(bisect.bisect_left(NUMBERS, value), 126)
    below = max(above - 1, 0)
    low, high = value - NUMBERS[below], NUMBERS[above] - value
    return below if low < high or (low == high and below % 2 == 0) else above


def rounded(value):
    return float(np.copysign(NUMBERS[nearest(abs(value))], value))


def test_the_largest_number_is_448():
    assert NUMBERS[-1] == 448
    assert sorted(NUMBERS) == NUMBERS


@settings(max_examples=60)
@given(
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 7, 32]),
    kind=st.sampled_from(["normal", "outlier", "constant", "zero row", "spread"]),
    seed=st.integers(0, 2**16),
)
def test_weights_and_tokens_are_rounded_to_e4m3(rows, columns, kind, seed):
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    if kind == "outlier":
        values[0, 0] = 1e6
    elif kind == "constant":
        values[:] = -0.3
    elif kind == "zero row":
        values[-1] = 0
    elif kind == "spread":
        values *= 10.0 ** np.random.default_rng(seed).integers(-8, 1, values.shape).astype(np.float32)
    weight, scale, _ = round_weight(torch.from_numpy(values), WeightScheme(8, None, True, "float"))
    tokens = round_activations(torch.from_numpy(values), ActivationScheme(True, type="float")).double().numpy()
    for row in range(rows):
        largest = float(max(abs(values[row])))
        step = largest / 448 if largest > 0 else 1.0
        assert scale[row, 0].item() == pytest.approx(step, rel=1e-6)
        # The quotient in float32, as it is rounded: a tie of float64 need not be one there.
        quotients = values[row] / scale[row].numpy()
        expected = [rounded(float(quotient)) for quotient in quotients]
        assert weight[row].float().tolist() == expected
        np.testing.assert_allclose(tokens[row], np.array(expected) * scale[row].item(), rtol=1e-6)
    bytes_found = weight.view(torch.uint8).numpy() & 127
    assert (bytes_found < 127).all()


def test_every_tie_goes_to_the_even_byte():
    ties = torch.tensor([(low + high) / 2 for low, high in pairwise(NUMBERS)])
    found = ties.to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    assert found == [nearest(tie) for tie in ties.tolist()]
    assert all(byte % 2 == 0 for byte in found)


def test_dynamic_needs_no_data_and_static_does():
    assert (FP8().calibration, FP8().forward_passes()) == (False, 0)
    assert (FP8(activations="static").calibration, FP8(activations="static").forward_passes()) == (True, 2)
    assert FP8().provides() == {"weights:fp8-channel", "activations:fp8-dynamic"}
    assert FP8(activations="static").provides() == {"weights:fp8-channel", "activations:fp8-static"}


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_models_stay_close(tiny_llama, activations):
    exact = tiny_llama().module(TOKENS).logits
    model = FP8(activations=activations).apply(tiny_llama(), CONTEXT)
    layers = dict(quantized_layers(model.module))
    assert len(layers) == 14
    assert {layer.weight.dtype for layer in layers.values()} == {torch.float8_e4m3fn}
    assert f"activations:fp8-{activations}" in model.tags
    assert 0 < ((model.module(TOKENS).logits - exact).norm() / exact.norm()).item() < 0.1


def test_a_static_scale_maps_the_largest_input_to_448(tiny_llama):
    seen = []
    model = tiny_llama()
    model.module.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.module(TOKENS)
    FP8(activations="static").apply(model, CONTEXT)
    scale = model.module.model.layers[0].self_attn.q_proj.input_scale
    torch.testing.assert_close(scale, seen[0].abs().max().reshape(1) / 448)


def test_larger_inputs_than_calibration_saw_are_cut_off():
    scheme, scale = ActivationScheme(False, type="float"), torch.tensor([0.01])
    found = round_activations(torch.tensor([100.0, -100.0, 4.0]), scheme, scale)
    torch.testing.assert_close(found, torch.tensor([4.48, -4.48, 3.84]))


def test_an_encoder(tiny_bert):
    model = FP8(activations="static").apply(tiny_bert(), CONTEXT)
    assert len(dict(quantized_layers(model.module))) == 13


def test_a_weight_that_is_not_finite_is_named(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.self_attn\.v_proj: a weight is not finite"):
        FP8().apply(model, CONTEXT)
