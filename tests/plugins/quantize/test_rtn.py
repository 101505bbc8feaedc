"""quantize.rtn against the plainest float64 reference, and its effect on a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.errors import OptkitError, RecipeError
from optkit.quantized import QuantizedLinear, WeightScheme, dequantize
from optkit.transforms import TransformContext
from optkit_quantize.rounding import round_weight
from optkit_quantize.rtn import RTN

CONTEXT = TransformContext(progress=lambda done, total, what: None)


def reference(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> list[np.ndarray]:
    """One weight at a time, in float64: integers, quotients before rounding, scales and zero points."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows, columns = weight.shape
    integers, quotients = np.zeros((rows, columns), dtype=int), np.zeros((rows, columns))
    scales, zeros = np.ones((rows, columns // group)), np.zeros((rows, columns // group), dtype=int)
    for row in range(rows):
        for g in range(columns // group):
            part = weight[row, g * group : (g + 1) * group].astype(np.float64)
            if symmetric:
                scale = max(abs(value) for value in part) / ((high - low) / 2)
            else:
                scale = (max(max(part), 0.0) - min(min(part), 0.0)) / (high - low)
            scale = scale if scale > 0 else 1.0
            zero = 0 if symmetric else min(max(round(low - min(min(part), 0.0) / scale), low), high)
            scales[row, g], zeros[row, g] = scale, zero
            for column, value in enumerate(part):
                integers[row, g * group + column] = min(max(round(value / scale + zero), low), high)
                quotients[row, g * group + column] = value / scale + zero
    return [integers, quotients, scales, zeros]


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    group=st.sampled_from([16, 32]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    kind=st.sampled_from(["normal", "outlier", "constant", "zero row", "positive", "tiny"]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_reference(rows, groups, group, bits, symmetric, kind, seed):
    weight = np.random.default_rng(seed).normal(size=(rows, groups * group)).astype(np.float32)
    if kind == "outlier":
        weight[0, 0] = 1000.0
    elif kind == "constant":
        weight[:] = 0.5
    elif kind == "zero row":
        weight[-1] = 0.0
    elif kind == "positive":
        weight = np.abs(weight)
    elif kind == "tiny":
        weight *= 1e-20
    scheme = WeightScheme(bits, group, symmetric)
    integers, scale, zero_point = round_weight(torch.from_numpy(weight), scheme)
    expected, quotients, scales, zeros = reference(weight, bits, group, symmetric)
    np.testing.assert_allclose(scale.numpy(), scales, rtol=1e-6)
    if zero_point is not None:
        # So may the zero point, and then takes its whole group along.
        moved = np.repeat(zero_point.numpy() != zeros, group, axis=1)
        assert np.abs(zero_point.numpy().astype(int) - zeros).max() <= 1
    else:
        moved = np.zeros(weight.shape, dtype=bool)
    # In float32 a quotient next to a half may round to the other neighbour.
    near_half = np.abs(np.abs(quotients - np.floor(quotients)) - 0.5) < 1e-3
    difference = np.abs(integers.numpy().astype(int) - expected)
    assert (difference[~near_half & ~moved] == 0).all()
    assert difference.max() <= 1
    assert (zero_point is None) == symmetric
    # Half a step is the most that rounding moves a weight; a zero point off its grid costs another half, and a
    # symmetric range lacks its topmost integer, which costs the largest weight one half more.
    error = np.abs(dequantize(integers, scale, zero_point).numpy().astype(np.float64) - weight)
    assert (error.reshape(rows, groups, group) <= 1.01 * scales[..., None] + 1e-30).all()


def test_one_scale_for_a_channel_of_any_width():
    weight = torch.randn(3, 7)
    integers, scale, zero_point = round_weight(weight, WeightScheme(8, None, True))
    assert (integers.shape, scale.shape, zero_point) == ((3, 7), (3, 1), None)
    torch.testing.assert_close(dequantize(integers, scale, None), weight, atol=0.51 * scale.max().item(), rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weight = torch.ones(2, 16)
    weight[1, 3] = bad
    with pytest.raises(OptkitError, match=r"^a\.b: a weight is not finite"):
        round_weight(weight, WeightScheme(4, None, True), name="a.b")


def test_quantizes_every_linear_but_the_head_by_default(tiny_llama):
    model = RTN().apply(tiny_llama(), CONTEXT)
    kinds = {name: type(layer) for name, layer in model.module.named_modules() if name.endswith(("proj", "lm_head"))}
    assert kinds.pop("lm_head") is torch.nn.Linear
    assert len(kinds) == 14
    assert set(kinds.values()) == {QuantizedLinear}
    assert "weights:int8-channel" in model.tags


def test_eight_bits_stay_close_and_two_do_not(tiny_llama):
    tokens = torch.arange(3, 40)[None]
    exact = tiny_llama().module(tokens).logits

    def distance(**options):
        logits = RTN(**options).apply(tiny_llama(), CONTEXT).module(tokens).logits
        return ((logits - exact).norm() / exact.norm()).item()

    eight, four, two = (distance(bits=bits, granularity="group", group_size=32) for bits in (8, 4, 2))
    assert eight < 0.02 < four < two


def test_a_tied_head_and_its_embedding_read_the_same_integers(tiny_llama):
    model = RTN(ignore=()).apply(tiny_llama(tie_word_embeddings=True), CONTEXT)
    head, table = model.module.lm_head, model.module.model.embed_tokens
    assert isinstance(head, QuantizedLinear)
    assert torch.equal(table.weight, head.dequantized())


def test_zeros_stay_zero():
    weight = torch.randn(4, 64)
    weight[weight.abs() < 0.5] = 0
    for symmetric in (True, False):
        integers, scale, zero_point = round_weight(weight, WeightScheme(4, 16, symmetric))
        assert (dequantize(integers, scale, zero_point)[weight == 0] == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "group"}, "group_size goes with"),
        ({"group_size": 32}, "group_size goes with"),
        ({"bits": 5}, "2, 3, 4 or 8"),
        ({"bits": "4"}, "2, 3, 4 or 8"),
        ({"bit": 4}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        RTN(**options)


def test_a_group_size_that_does_not_divide_is_refused_before_the_work(tiny_folder):
    from optkit.builtin.huggingface import HuggingFace

    card = HuggingFace(model=str(tiny_folder)).inspect()
    with pytest.raises(
        RecipeError, match=r"does not divide the \d+ input features of .*, found 48; choose 16 or 32 or 64$"
    ):
        RTN(granularity="group", group_size=48).check(card)
