"""quantize.gptq against one column at a time in float64, and its effect on models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError
from optkit.quantized import ActivationScheme, QuantizedLinear, WeightScheme, dequantize, quantized_layers
from optkit.transforms import TransformContext
from optkit_quantize.gptq import GPTQ, gptq_round
from optkit_quantize.rounding import round_weight
from optkit_quantize.rtn import RTN
from tests.calibrating import RealModel, context, distance, problem, texts

GROUPS = {"granularity": "group", "group_size": 16}


def reference(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    group: int,
    symmetric: bool,
    order: np.ndarray | None,
    keep_zeros: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row and one column at a time: the inverse Hessian loses a column and row when its feature is fixed.

    Returns integers, scales, and for each row how many features were visited before a number came so close to the
    middle of two integers that float32 may round it to the other.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rows, features = weight.shape
    mean = np.trace(hessian) / features
    damped = hessian + 0.01 * (mean if mean > 0 else 1.0) * np.eye(features)
    integers = np.zeros((rows, features), dtype=int)
    scales, zeros = np.ones((rows, features // group)), np.zeros((rows, features // group), dtype=int)
    clear = np.full(rows, features)

    def near_half(value: float) -> bool:
        return abs(abs(value - math.floor(value)) - 0.5) < 2e-3

    for row in range(rows):
        left = weight[row].astype(np.float64)
        pruned = (weight[row] == 0) & keep_zeros
        inverse = np.linalg.inv(damped)

        def fit(g: int, row: int = row) -> bool:
            own = slice(g * group, (g + 1) * group)
            part = (weight[row] if order is not None else left)[own]  # noqa: B023
            part = np.where(pruned[own], 0.0, part)  # noqa: B023
            smallest, largest = min(part.min(), 0.0), max(part.max(), 0.0)
            scale = max(-smallest, largest) / ((high - low) / 2) if symmetric else (largest - smallest) / (high - low)
            scales[row, g] = scale = scale if scale > 0 else 1.0
            shift = low - smallest / scale
            zeros[row, g] = 0 if symmetric else min(max(round(shift), low), high)
            return not symmetric and near_half(shift)

        unclear = order is not None and sum(fit(g) for g in range(features // group)) > 0
        for visited, feature in enumerate(range(features) if order is None else order):
            g = feature // group
            if order is None and feature % group == 0:
                unclear |= fit(g)
            quotient = (0.0 if pruned[feature] else left[feature]) / scales[row, g] + zeros[row, g]
            unclear |= low - 1 < quotient < high + 1 and near_half(quotient)
            if unclear:
                clear[row] = min(clear[row], visited)
            integers[row, feature] = min(max(round(quotient), low), high)
            value = (integers[row, feature] - zeros[row, g]) * scales[row, g]
            left -= (left[feature] - value) / inverse[feature, feature] * inverse[feature]
            inverse -= np.outer(inverse[:, feature], inverse[feature]) / inverse[feature, feature]
            inverse[feature, feature] = 1.0  # fixed: nothing reads it any more
    return integers, scales, clear


@settings(max_examples=60)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    group=st.sampled_from([16, 32]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    keep_zeros=st.booleans(),
    block_size=st.sampled_from([1, 7, 16, 24, 128]),
    kind=st.sampled_from(["normal", "outlier", "constant", "zero row", "dead", "silent"]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_reference(rows, groups, group, bits, symmetric, act_order, keep_zeros, block_size, kind, seed):
    weight, hessian = problem(rows, groups * group, seed, kind)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.4] = 0
    integers, scale, zero_point = gptq_round(
        weight,
        hessian,
        WeightScheme(bits, group, symmetric),
        block_size=block_size,
        act_order=act_order,
        scale_search=False,
        keep_zeros=keep_zeros,
    )
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable") if act_order else None
    expected, scales, clear = reference(
        weight.numpy(), hessian.double().numpy(), bits, group, symmetric, order, keep_zeros
    )
    assert (integers.dtype, zero_point is None) == (torch.int8, symmetric)
    for row in range(rows):
        sure = (np.arange(groups * group) if order is None else order)[: clear[row]]
        np.testing.assert_array_equal(integers[row].numpy()[sure], expected[row][sure])
        if clear[row] == groups * group:
            np.testing.assert_allclose(scale[row].numpy(), scales[row], rtol=2e-3)


def error(weight: torch.Tensor, hessian: torch.Tensor, rounded: tuple) -> float:
    wrong = (dequantize(*rounded) - weight).double()
    return ((wrong @ hessian.double()) * wrong).sum().item()


@settings(max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    options=st.sampled_from([{}, {"act_order": False}, {"scale_search": False}]),
    kind=st.sampled_from(["normal", "outlier", "zero row", "dead", "few", "silent"]),
    seed=st.integers(0, 2**16),
)
def test_what_reaches_the_output_is_no_worse_than_rounded_to_nearest(bits, symmetric, options, kind, seed):
    weight, hessian = problem(16, 64, seed, kind)
    scheme = WeightScheme(bits, 32, symmetric)
    nearest = error(weight, hessian, round_weight(weight, scheme))
    ours = error(weight, hessian, gptq_round(weight, hessian, scheme, **options))
    # A greedy algorithm promises nothing: 5% is for the outliers, where it gains next to nothing. In order and with
    # full ranges, not tried here, two bits can lose to rounding: the first errors outgrow the ranges of later groups.
    assert ours <= 1.05 * nearest + 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_constant_weights_gain_in_most_cases(bits):
    # All of them are the largest of their group, so that none can be rounded up: one in a hundred loses up to 22%.
    scheme, gains = WeightScheme(bits, 32, symmetric=True), []
    for seed in range(30):
        weight, hessian = problem(16, 64, seed, "constant")
        nearest = error(weight, hessian, round_weight(weight, scheme))
        gains.append(error(weight, hessian, gptq_round(weight, hessian, scheme)) / nearest)
    assert np.median(gains) < 0.9


@given(bits=st.sampled_from([2, 3, 4]), symmetric=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=30)
def test_a_searched_scale_errs_least_among_the_shrunk_ranges(bits, symmetric, seed):
    random = np.random.default_rng(seed)
    weight = random.standard_t(3, size=32).astype(np.float32)
    weights = np.exp(random.normal(size=32))
    # Without a connection between features, each one's lasting error is its diagonal.
    hessian = torch.diag(torch.from_numpy(weights).float())
    scheme = WeightScheme(bits, None, symmetric)
    chosen = gptq_round(torch.from_numpy(weight)[None], hessian, scheme, damping=1e-9)
    low, high = scheme.range
    errors = []
    for step in range(11):
        smallest, largest = np.array([min(weight.min(), 0), max(weight.max(), 0)], dtype=np.float64) * (1 - step / 20)
        scale = max(-smallest, largest) / ((high - low) / 2) if symmetric else (largest - smallest) / (high - low)
        zero = 0 if symmetric else min(max(round(low - smallest / scale), low), high)
        values = (np.clip(np.round(weight / scale + zero), low, high) - zero) * scale
        errors.append(((values - weight) ** 2 * weights).sum())
    assert error(torch.from_numpy(weight)[None], hessian, chosen) == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_feature_without_inputs_is_rounded_to_nearest(act_order):
    weight, hessian = problem(4, 64, 0, "dead")
    dead = hessian.diagonal() == 0
    scheme = WeightScheme(4, None, True)
    nearest = round_weight(weight, scheme)[0]
    ours = gptq_round(weight, hessian, scheme, act_order=act_order, scale_search=False)[0]
    assert dead.sum() == 4
    assert torch.equal(ours[:, dead], nearest[:, dead])
    assert not torch.equal(ours[:, ~dead], nearest[:, ~dead])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_rows_do_not_depend_on_each_other_and_zeros_stay_zero(symmetric, act_order):
    weight, hessian = problem(6, 48, 3, "zero row")
    whole = gptq_round(weight, hessian, WeightScheme(3, 16, symmetric), act_order=act_order)
    for row in range(6):
        alone = gptq_round(weight[row : row + 1], hessian, WeightScheme(3, 16, symmetric), act_order=act_order)
        torch.testing.assert_close(dequantize(*alone)[0], dequantize(*whole)[row])
    assert (dequantize(*whole)[-1] == 0).all()


@settings(max_examples=30)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    options=st.sampled_from([{}, {"act_order": False}, {"scale_search": False}]),
    kind=st.sampled_from(["normal", "outlier", "zero row", "dead", "few", "silent"]),
    seed=st.integers(0, 2**16),
)
def test_pruned_weights_stay_zero_and_their_errors_are_made_good(bits, symmetric, options, kind, seed):
    weight, hessian = problem(16, 64, seed, kind)
    weight[:, ::2] = 0
    before = weight.clone()
    scheme = WeightScheme(bits, 32, symmetric)
    kept = gptq_round(weight, hessian, scheme, keep_zeros=True, **options)
    assert torch.equal(weight, before)
    assert (dequantize(*kept)[:, ::2] == 0).all()
    nearest = error(weight, hessian, round_weight(weight, scheme))
    assert error(weight, hessian, kept) <= 1.05 * nearest + 1e-9


def test_inputs_are_left_alone():
    weight, hessian = problem(1, 32, 0)
    before = weight.clone(), hessian.clone()
    gptq_round(weight, hessian, WeightScheme(4, 16, True))
    gptq_round(weight, hessian, WeightScheme(4, 16, True), act_order=False)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_own_name(bad, tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].mlp.up_proj.weight[0, 3] = bad
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.mlp\.up_proj: a weight is not finite"):
        GPTQ(targets=(r"re:.*layers\.1\.mlp\.(gate|up)_proj",)).apply(model, context(texts(9)))


@pytest.mark.parametrize("bad", ["nan", "indefinite"])
def test_a_hessian_that_no_damping_repairs_is_refused(bad):
    hessian = torch.diag(torch.tensor([1.0, -9.0] * 8)) if bad == "indefinite" else torch.full((16, 16), torch.nan)
    with pytest.raises(OptkitError, match=r"^a\.b: the Hessian of its inputs is not positive definite .*found 0\.01;"):
        gptq_round(torch.ones(2, 16), hessian, WeightScheme(4, None, True), name="a.b")


def test_more_damping_repairs_a_hessian_that_is_not_quite_positive():
    hessian = torch.diag(torch.tensor([1.0, -0.05] * 8))
    integers, _, _ = gptq_round(torch.ones(2, 16), hessian, WeightScheme(4, None, True))
    assert (integers == 7).all()


# --- models


def test_a_model_keeps_its_outputs_better_than_rounded_to_nearest(tiny_llama):
    calibration = texts(60, 60, 60)
    tokens = calibration.inputs[0]["input_ids"]
    exact = tiny_llama().module(tokens)[0]
    nearest = distance(RTN(bits=4, **GROUPS).apply(tiny_llama(), context(calibration)).module, exact, tokens)
    for options in ({}, {"act_order": False}, {"scale_search": False}, {"symmetric": False}):
        model = GPTQ(bits=4, **GROUPS, **options).apply(tiny_llama(), context(calibration))
        assert distance(model.module, exact, tokens) < 0.8 * nearest
        assert len(list(quantized_layers(model.module))) == 14
        assert model.tags >= {"weights:int4-group" if options.get("symmetric", True) else "weights:int4-group-asym"}


def test_rounded_inputs_count_from_the_second_block_on(tiny_llama):
    calibration = context(texts(30, 30))
    alone, rounded = (
        dict(quantized_layers(GPTQ(bits=4, **GROUPS, activations=kind).apply(tiny_llama(), calibration).module))
        for kind in ("float", "int8")
    )
    assert {layer.activations for layer in rounded.values()} == {ActivationScheme(dynamic=True)}
    same = {name: torch.equal(layer.weight, alone[name].weight) for name, layer in rounded.items()}
    assert all(equal for name, equal in same.items() if ".layers.0." in name)
    assert not all(same.values())
    assert GPTQ(activations="int8").provides() == {"weights:int8-channel", "activations:int8-dynamic"}


@pytest.mark.parametrize("tag", ["sparsity:unstructured", "sparsity:2:4", None])
def test_only_a_pruned_model_keeps_its_zeros(tag, tiny_llama):
    model = tiny_llama()
    layer = model.module.model.layers[0].mlp.up_proj
    layer.weight[:, ::2] = 0
    model = GPTQ(bits=4, **GROUPS).apply(model if tag is None else model.tagged(tag), context(texts(30, 30)))
    stayed = (model.module.model.layers[0].mlp.up_proj.dequantized()[:, ::2] == 0).all()
    assert stayed == (tag is not None)


def test_what_is_rounded_together_is_what_is_rounded_alone(tiny_llama):
    calibration = texts(20, 30)
    together = GPTQ(bits=3, **GROUPS).apply(tiny_llama(), context(calibration)).module.model.layers[0].self_attn
    for name in ("q_proj", "v_proj"):
        target = (f"model.layers.0.self_attn.{name}",)
        alone = GPTQ(bits=3, targets=target, **GROUPS).apply(tiny_llama(), context(calibration)).module
        for part in ("weight", "scale"):
            one, other = (getattr(m.get_submodule(p), part) for m, p in ((together, name), (alone, target[0])))
            torch.testing.assert_close(one, other)


def test_the_same_twice_and_after_a_kill(tiny_llama, tmp_path):
    calibration, options = texts(20, 30), {"bits": 4, **GROUPS}

    def layers(model):
        return {name: layer.state_dict() for name, layer in quantized_layers(model.module)}

    whole = layers(GPTQ(**options).apply(tiny_llama(), context(calibration)))

    class Killed(Exception):
        pass

    def until_the_second_block(done: int, total: int, what: str) -> None:
        if what == "model.layers.1":
            raise Killed

    stopped = TransformContext(until_the_second_block, calibration, Checkpoint(tmp_path))
    with pytest.raises(Killed):
        GPTQ(**options).apply(tiny_llama(), stopped)
    resumed = layers(GPTQ(**options).apply(tiny_llama(), context(calibration, Checkpoint(tmp_path))))
    assert whole.keys() == resumed.keys()
    for name, parts in whole.items():
        for part, tensor in parts.items():
            assert torch.equal(tensor, resumed[name][part])


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_can_be_quantized_too(tied, tiny_llama):
    options = {"bits": 8, "targets": ("lm_head",), "ignore": ()}
    model = GPTQ(**options).apply(tiny_llama(tie_word_embeddings=tied), context(texts(20)))
    assert [name for name, _ in quantized_layers(model.module)] == ["lm_head"]
    head, table = model.module.lm_head, model.module.model.embed_tokens
    assert torch.equal(table.weight, head.dequantized()) == tied


def test_encoders_are_quantized_too(tiny_bert):
    calibration = texts(20, 30)
    tokens = calibration.inputs[0]["input_ids"]
    exact = tiny_bert().module(tokens)[0]
    model = GPTQ(bits=4, **GROUPS).apply(tiny_bert(), context(calibration))
    assert len(list(quantized_layers(model.module))) == 13
    layer = model.module.encoder.layer[0].attention.self.query
    assert isinstance(layer, QuantizedLinear)
    assert layer.bias is not None
    assert distance(model.module, exact, tokens) < distance(
        RTN(bits=4, **GROUPS).apply(tiny_bert(), context(texts(9))).module, exact, tokens
    )


def test_no_data_is_refused(tiny_llama):
    with pytest.raises(OptkitError, match="no calibration data"):
        GPTQ().apply(tiny_llama(), context(Calibration()))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bits", [4, 3])
def test_a_real_model_predicts_better_than_rounded_to_nearest(bits, smollm2):
    real = RealModel(smollm2, samples=8)
    options = {"bits": bits, "granularity": "group", "group_size": 64}
    exact = real.log_perplexity(real.load())
    nearest = real.log_perplexity(RTN(**options).apply(real.load(), context(Calibration())))
    ours = real.log_perplexity(GPTQ(**options).apply(real.load(), context(real.calibration)))
    # GPTQ undoes at least half of what rounding to nearest costs, in the logarithm.
    assert ours - exact < 0.5 * (nearest - exact)


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 2.0}, {"block_size": 0}, {"bits": 5}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        GPTQ(**options)
