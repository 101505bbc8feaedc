"""quantize.hqq against a float64 reference of one group at a time, and its effect on models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.errors import OptkitError
from optkit.quantized import QuantizedLinear, WeightScheme, dequantize, quantized_layers
from optkit.transforms import TransformContext
from optkit_quantize.hqq import HQQ, hqq_round
from optkit_quantize.rounding import round_weight

CONTEXT = TransformContext(progress=lambda done, total, what: None)
KINDS = st.sampled_from(["normal", "outlier", "constant", "zero row", "positive", "tiny"])


def matrix(rows: int, features: int, seed: int, kind: str) -> torch.Tensor:
    weight = np.random.default_rng(seed).standard_t(4, size=(rows, features)).astype(np.float32)
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
    return torch.from_numpy(weight)


def reference(group: np.ndarray, bits: int, symmetric: bool, p: float, beta: float, iterations: int) -> tuple:
    """One weight at a time, in float64.

    Returns integers, scale, zero point and whether every choice on the way was clear: no number next to the middle of
    two integers, no two losses next to each other.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    group = group.astype(np.float64)
    smallest, largest = min(group.min(), 0.0), max(group.max(), 0.0)
    first = max(-smallest, largest) / ((high - low) / 2) if symmetric else (largest - smallest) / (high - low)
    first = first if first > 0 else 1.0
    clear = True

    def nearest(value: float) -> int:
        nonlocal clear
        if low - 1 < value < high + 1 and abs(abs(value - math.floor(value)) - 0.5) < 1e-4:
            clear = False
        return min(max(round(value), low), high)

    zero = 0 if symmetric else nearest(low - smallest / first)
    values, scale = [value / first for value in group], 1.0
    best, least = (scale, zero), math.inf
    for _ in range(iterations + 1):
        integers = [nearest(value / scale + zero) for value in values]
        errors = [value - (integer - zero) * scale for value, integer in zip(values, integers, strict=True)]
        loss = sum(abs(error) ** p for error in errors)
        # An error of zero in exact numbers is one of 1e-7 in float32, and its power 0.7 is not so small.
        if abs(loss - least) < 1e-3 * loss + 1e-3:
            clear = False
        if loss >= least:
            break
        best, least = (scale, zero), loss
        kept = []
        for value, error in zip(values, errors, strict=True):
            outlying = 0.0
            if error != 0:
                outlying = math.copysign(max(abs(error) - abs(error) ** (p - 1) / beta, 0.0), error)
            kept.append(value - outlying)
        beta *= 1.01
        if not symmetric:
            zero = nearest(sum(i - value / scale for i, value in zip(integers, kept, strict=True)) / len(kept))
        power = sum((integer - zero) ** 2 for integer in integers)
        product = sum((integer - zero) * value for integer, value in zip(integers, kept, strict=True))
        scale = product / power if power > 0 and product > 0 else scale
    scale, zero = best[0] * first, best[1]
    return [nearest(value / scale + zero) for value in group], scale, zero, clear


@settings(max_examples=60)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    lp_norm=st.sampled_from([0.5, 0.7, 1.0]),
    beta=st.sampled_from([2.0, 10.0, 1e4]),
    iterations=st.sampled_from([1, 20]),
    kind=KINDS,
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_reference(rows, groups, bits, symmetric, lp_norm, beta, iterations, kind, seed):
    weight = matrix(rows, groups * 16, seed, kind)
    integers, scale, zero_point = hqq_round(
        weight, WeightScheme(bits, 16, symmetric), lp_norm=lp_norm, beta=beta, iterations=iterations
    )
    assert (integers.dtype, zero_point is None) == (torch.int8, symmetric)
    for row in range(rows):
        for g in range(groups):
            part = slice(g * 16, g * 16 + 16)
            expected, wanted, zero, clear = reference(
                weight[row, part].numpy(), bits, symmetric, lp_norm, beta, iterations
            )
            if clear:
                np.testing.assert_array_equal(integers[row, part].numpy(), expected)
                np.testing.assert_allclose(scale[row, g].item(), wanted, rtol=1e-4)
                assert symmetric or zero_point[row, g] == zero


def losses(weight: torch.Tensor, rounded: tuple, p: float) -> torch.Tensor:
    """Of each group of 16, in steps of the range."""
    step = weight.double().reshape(len(weight), -1, 16).abs().amax(-1, keepdim=True).clamp(min=1e-30)
    error = (dequantize(*rounded).double() - weight.double()).reshape(len(weight), -1, 16) / step
    return error.abs().pow(p).sum(-1)


@settings(max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    lp_norm=st.sampled_from([0.3, 0.7, 1.0]),
    beta=st.sampled_from([0.1, 10.0, 1e9]),
    kind=KINDS,
    seed=st.integers(0, 2**16),
)
def test_no_group_is_worse_than_rounded_to_nearest(bits, symmetric, lp_norm, beta, kind, seed):
    weight = matrix(8, 64, seed, kind)
    scheme = WeightScheme(bits, 16, symmetric)
    ours = losses(weight, hqq_round(weight, scheme, lp_norm=lp_norm, beta=beta), lp_norm)
    nearest = losses(weight, round_weight(weight, scheme), lp_norm)
    # An error of zero is one of 1e-7 in float32, and to the power 0.3 it is 0.008.
    assert (ours <= nearest * (1 + 1e-4) + 16 * 1e-6**lp_norm).all()


def test_it_is_better_for_most_groups_and_lets_outliers_go():
    weight = matrix(64, 64, 0, "normal")
    for symmetric in (True, False):
        scheme = WeightScheme(3, 16, symmetric)
        ours, nearest = (
            losses(weight, hqq_round(weight, scheme), 0.7),
            losses(weight, round_weight(weight, scheme), 0.7),
        )
        assert (ours < nearest).float().mean() > 0.6
    scales = hqq_round(weight, WeightScheme(3, 16, True))[1], round_weight(weight, WeightScheme(3, 16, True))[1]
    assert scales[0].mean() < scales[1].mean()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero_rows_are_independent_and_the_same_comes_twice(symmetric):
    weight, scheme = matrix(4, 64, 0, "zero row"), WeightScheme(3, 16, symmetric)
    whole = hqq_round(weight, scheme)
    assert (dequantize(*whole)[-1] == 0).all()
    for row in range(4):
        alone = hqq_round(weight[row : row + 1], scheme)
        torch.testing.assert_close(dequantize(*alone)[0], dequantize(*whole)[row])
    for one, other in zip(whole, hqq_round(weight, scheme), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_one_scale_for_a_channel_of_any_width():
    integers, scale, zero_point = hqq_round(torch.randn(3, 7), WeightScheme(4, None, True))
    assert (integers.shape, scale.shape, zero_point) == ((3, 7), (3, 1), None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad, tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].mlp.up_proj.weight[0, 3] = bad
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.mlp\.up_proj: a weight is not finite"):
        HQQ().apply(model, CONTEXT)


def test_a_model_is_quantized_all_but_its_head(tiny_llama):
    told = []
    options = {"bits": 4, "granularity": "group", "group_size": 16, "symmetric": False}
    model = HQQ(**options).apply(tiny_llama(), TransformContext(lambda *news: told.append(news)))
    assert len(list(quantized_layers(model.module))) == 14
    assert "weights:int4-group-asym" in model.tags
    assert (told[0], told[-1]) == ((0, 14, "model.layers.0.self_attn.q_proj"), (14, 14, "done"))
    tokens = torch.arange(3, 40)[None]
    exact = tiny_llama().module(tokens).logits
    assert (model.module(tokens).logits - exact).norm() < 0.2 * exact.norm()


def test_a_tied_head_and_its_embedding_read_the_same_integers(tiny_llama):
    model = HQQ(ignore=()).apply(tiny_llama(tie_word_embeddings=True), CONTEXT)
    head, table = model.module.lm_head, model.module.model.embed_tokens
    assert isinstance(head, QuantizedLinear)
    assert torch.equal(table.weight, head.dequantized())


def test_encoders_are_quantized_too(tiny_bert):
    model = HQQ(bits=4).apply(tiny_bert(), CONTEXT)
    assert len(list(quantized_layers(model.module))) == 13


@pytest.mark.parametrize(
    "options", [{"lp_norm": 0.0}, {"lp_norm": 1.5}, {"beta": 0.0}, {"kappa": 1.01}, {"iterations": 0}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        HQQ(**options)
