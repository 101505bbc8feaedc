"""quantize.awq against searches written out in float64, and its effect on models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError, RecipeError
from optkit.model import ModelCard
from optkit.quantized import dequantize, quantized_layers
from optkit.schemes import WeightScheme
from optkit.transforms import TransformContext
from optkit_quantize.awq import AWQ, best_scale, clipped_round, product_error, scales_to_try
from optkit_quantize.rounding import round_weight
from optkit_quantize.rtn import RTN
from optkit_quantize.structure import Feed, fold, layout_of
from tests.calibrating import context, distance, texts

GROUPS = {"granularity": "group", "group_size": 16}


@pytest.fixture
def outlying(tiny_llama):
    """`outlying(**config)`: the tiny model, with some channels 12 times as large and read by smaller weights."""

    def make(**config):
        model = tiny_llama(**config)
        for index in range(2):
            for feed in layout_of(model.tags, what="a test", remedy="").feeds(model.module, f"model.layers.{index}"):
                scale = torch.ones(len(model.module.get_submodule(feed.producer).weight))
                scale[::9] = 1 / 12
                fold(model.module, feed, scale)
        return model

    return make


def nearest(values: np.ndarray, share: float, scheme: WeightScheme) -> np.ndarray:
    """One group rounded within a share of its range. Divided in float32: the largest weight is in the middle of two
    integers, and which one is taken depends on its last bit."""
    least, most = scheme.range
    values = values.astype(np.float32)
    low = np.float32(min(values.min() * np.float32(share), 0))
    high = np.float32(max(values.max() * np.float32(share), 0))
    if scheme.symmetric:
        scale = max(-low, high) / np.float32((most - least) / 2)
    else:
        scale = (high - low) / np.float32(most - least)
    scale = scale if scale > 0 else np.float32(1)
    zero = 0 if scheme.symmetric else np.clip(np.round(np.float32(least) - low / scale), least, most)
    return (np.clip(np.round(values / scale + np.float32(zero)), least, most) - zero) * np.float64(scale)


# --- scales


@given(
    magnitudes=st.lists(st.one_of(st.just(0.0), st.floats(2**-20, 2**14, width=32)), min_size=1, max_size=8),
    grid=st.integers(1, 20),
)
def test_the_scales_are_powers_of_the_magnitudes_around_one(magnitudes, grid):
    tried = list(scales_to_try(torch.tensor(magnitudes), grid))
    assert len(tried) == grid
    assert torch.equal(tried[0], torch.ones(len(magnitudes)))
    live = [value for value in magnitudes if value > 0]
    for step, scale in enumerate(tried):
        for value, found in zip(magnitudes, scale.tolist(), strict=True):
            ratio = step / grid
            expected = 1.0 if value == 0 else value**ratio / (max(live) ** ratio * min(live) ** ratio) ** 0.5
            assert found == pytest.approx(expected, rel=1e-4)


@given(
    rows=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    kind=st.sampled_from(["normal", "outlier", "dead", "zero row", "constant", "silent"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_the_best_scale_errs_least_and_never_more_than_none(rows, bits, symmetric, kind, seed):
    random = np.random.default_rng(seed)
    weight, sample = random.normal(size=(rows, 32)), random.normal(size=(24, 32)) * np.exp(random.normal(size=32))
    if kind == "outlier":
        sample[:, 3] *= 100
    elif kind == "dead":
        sample[:, ::5] = 0
    elif kind == "zero row":
        weight[0] = 0
    elif kind == "constant":
        weight[:] = 0.5
    elif kind == "silent":
        sample[:] = 0
    scheme, layer, x = (
        WeightScheme(bits, 16, symmetric),
        nn.Linear(32, rows, bias=False),
        torch.from_numpy(sample).float(),
    )
    layer.weight = nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False)
    before, feed = layer.weight.clone(), Feed("up", ("down",), "down")
    tried = list(scales_to_try(x.abs().mean(0), 8))
    best = best_scale(feed, {"down": layer}, iter(tried), scheme, product_error({"down": layer}, 2 * x.T @ x / len(x)))
    assert torch.equal(layer.weight, before)
    errors = []
    for scale in tried:
        spread = scale.numpy()
        scaled = (weight.astype(np.float32) * spread).reshape(rows, 2, 16)
        rounded = [[nearest(group, 1.0, scheme) for group in row] for row in scaled]
        errors.append(((sample @ (np.reshape(rounded, (rows, 32)) / spread - weight).T) ** 2).sum())
    found = next(index for index, scale in enumerate(tried) if scale is best)
    assert errors[found] <= min(errors) * 1.001 + 1e-9


# --- clips


@given(
    group=st.sampled_from([None, 8, 16]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    kind=st.sampled_from(["normal", "outlier", "dead", "zero row", "constant"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_a_clipped_group_errs_least_among_the_shrunk_ranges(group, bits, symmetric, kind, seed):
    random = np.random.default_rng(seed)
    weight = random.standard_t(3, size=(3, 16))
    sample = random.normal(size=(20, 16)) @ random.normal(size=(16, 16))
    if kind == "outlier":
        weight[0, 0] = 1000
    elif kind == "dead":
        sample[:, ::3] = 0
    elif kind == "zero row":
        weight[1] = 0
    elif kind == "constant":
        weight[:] = 0.5
    scheme = WeightScheme(bits, group, symmetric)
    stored = clipped_round(torch.from_numpy(weight).float(), torch.from_numpy(sample.T @ sample).float(), scheme)
    read_back = dequantize(*stored).double().numpy()
    size = group or 16
    for row in range(3):
        for start in range(0, 16, size):
            part, seen = weight[row, start : start + size], sample[:, start : start + size]

            def error(values, part=part, seen=seen):
                return ((seen @ (values - part)) ** 2).sum()

            shares = [1 - step / 40 for step in range(21)]
            errors = [error(nearest(part, share, scheme)) for share in shares]
            ours = error(read_back[row, start : start + size])
            # The search sums in float32.
            assert ours <= min(errors) * 1.001 + 1e-6 * ((seen @ part) ** 2).sum() + 1e-12
    assert (read_back[1] == 0).all() or kind != "zero row"


def test_an_outlier_that_no_input_meets_is_clipped():
    weight, sample = torch.ones(1, 16), torch.randn(40, 16)
    weight[0, :8] = -1
    weight[0, 3], sample[:, 3] = 1.8, 0
    scheme = WeightScheme(4, None, True)
    clipped = dequantize(*clipped_round(weight, sample.T @ sample, scheme))
    whole = dequantize(*round_weight(weight, scheme))
    assert clipped[0, 3] < 1.5 < whole[0, 3]
    assert ((clipped - weight) @ sample.T).square().sum() < 0.5 * ((whole - weight) @ sample.T).square().sum()


# --- models


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{**GROUPS, "symmetric": False}, {}])
def test_a_model_keeps_its_outputs_better_than_rounded_to_nearest(bits, options, outlying):
    tokens = texts(50).inputs[0]["input_ids"]
    exact = outlying().module(tokens)[0]
    plain = distance(RTN(bits=bits, **options).apply(outlying(), context(Calibration())).module, exact, tokens)
    model = AWQ(bits=bits, grid=8, **options).apply(outlying(), context(texts(60, 60)))
    assert distance(model.module, exact, tokens) < (0.9 if bits > 2 else 1) * plain
    assert len(list(quantized_layers(model.module))) == 14
    assert f"weights:int{bits}-{'group-asym' if options else 'channel'}" in model.tags


@pytest.mark.parametrize("config", [{"num_key_value_heads": 1}, {"attention_bias": True, "mlp_bias": True}])
def test_shared_heads_and_biases_are_scaled_too(config, outlying):
    tokens = texts(50).inputs[0]["input_ids"]
    exact = outlying(**config).module(tokens)[0]
    model = AWQ(bits=8, **GROUPS).apply(outlying(**config), context(texts(60, 60)))
    plain = RTN(bits=8, **GROUPS).apply(outlying(**config), context(Calibration()))
    assert distance(model.module, exact, tokens) < distance(plain.module, exact, tokens) < 0.1


def test_each_part_helps(outlying):
    tokens = texts(50).inputs[0]["input_ids"]
    exact = outlying().module(tokens)[0]

    def of(**options):
        return distance(
            AWQ(bits=3, **GROUPS, **options).apply(outlying(), context(texts(60, 60))).module, exact, tokens
        )

    neither, clips, scales, both = of(grid=1, clip=False), of(grid=1), of(grid=8, clip=False), of(grid=8)
    assert neither == distance(RTN(bits=3, **GROUPS).apply(outlying(), context(Calibration())).module, exact, tokens)
    assert both < min(clips, scales) < max(clips, scales) < neither


def test_only_what_is_chosen_is_rounded_and_the_rest_follows_its_scales(outlying):
    tokens = texts(50).inputs[0]["input_ids"]
    exact = outlying().module(tokens)[0]
    chosen = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
    model = AWQ(bits=8, **GROUPS, targets=chosen).apply(outlying(), context(texts(30)))
    assert tuple(name for name, _ in quantized_layers(model.module)) == chosen
    assert distance(model.module, exact, tokens) < 0.01
    layer, original = model.module.model.layers[0], outlying().module.model.layers[0]
    assert not torch.equal(layer.mlp.gate_proj.weight, original.mlp.gate_proj.weight)
    assert torch.equal(layer.self_attn.o_proj.weight, original.self_attn.o_proj.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_can_be_quantized_too(tied, tiny_llama):
    options = {"bits": 4, "targets": ("lm_head",), "ignore": ()}
    model = AWQ(**options).apply(tiny_llama(tie_word_embeddings=tied), context(texts(20)))
    assert [name for name, _ in quantized_layers(model.module)] == ["lm_head"]
    head, table = model.module.lm_head, model.module.model.embed_tokens
    assert torch.equal(table.weight, head.dequantized()) == tied


def test_the_same_twice_and_after_a_kill(outlying, tmp_path):
    calibration, options = texts(20, 30), {"bits": 4, "grid": 6, **GROUPS}

    def weights(model):
        return model.module.state_dict()

    whole = weights(AWQ(**options).apply(outlying(), context(calibration)))

    class Killed(Exception):
        pass

    def until_the_second_block(done: int, total: int, what: str) -> None:
        if what == "model.layers.1":
            raise Killed

    stopped = TransformContext(until_the_second_block, calibration, Checkpoint(tmp_path))
    with pytest.raises(Killed):
        AWQ(**options).apply(outlying(), stopped)
    resumed = weights(AWQ(**options).apply(outlying(), context(calibration, Checkpoint(tmp_path))))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_own_name(bad, tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].mlp.up_proj.weight[0, 3] = bad
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.mlp\.up_proj: a weight is not finite"):
        AWQ(targets=(r"re:.*layers\.1\.mlp\.(gate|up)_proj",)).apply(model, context(texts(9)))


def test_an_encoder_is_refused(tiny_bert):
    shapes = {"linears": {"a": (16, 16)}, "parameters": 256, "bytes_per_parameter": 4, "vocab_size": 8}
    rest = {"hidden_size": 8, "layers": 1, "max_length": 8, "kv_values_per_token": 0, "tied_head": False}
    card = ModelCard("tiny", frozenset({"arch:bert", "weights:float"}), **shapes, **rest)
    for refused in (lambda: AWQ().check(card), lambda: AWQ().apply(tiny_bert(), context(texts(9)))):
        with pytest.raises(RecipeError, match=r"^AWQ folds scales .*, found 'bert'; use quantize\.gptq"):
            refused()


def test_no_data_is_refused(tiny_llama):
    with pytest.raises(OptkitError, match="no calibration data"):
        AWQ().apply(tiny_llama(), context(Calibration()))


@pytest.mark.parametrize("options", [{"grid": 0}, {"grid": 101}, {"clip": 1}, {"bits": 5}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        AWQ(**options)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bits", [4, 3])
def test_a_real_model_predicts_more_alike_than_rounded_to_nearest(bits, smollm2):
    from optkit.builtin.gguf import GGUF
    from optkit.builtin.texts import PythonReference
    from optkit.evaluate.text import windows

    def load():
        return GGUF(file=str(smollm2)).load()

    def predictions(module):
        return [torch.log_softmax(module(torch.tensor([window])).logits[0], -1) for window in held_out]

    def divergence(module):
        pairs = zip(exact, predictions(module), strict=True)
        return sum((wanted.exp() * (wanted - given)).sum(-1).mean().item() for wanted, given in pairs)

    model, options = load(), {"bits": bits, "granularity": "group", "group_size": 64}
    *held_out, _, _, a, b, c, d = windows(model.tokenizer, PythonReference(), 10 * 256, 256)
    calibration = Calibration(tuple({"input_ids": torch.tensor([window])} for window in (a, b, c, d)))
    exact = predictions(model.module)
    plain = divergence(RTN(**options).apply(load(), context(Calibration())).module)
    assert divergence(AWQ(**options).apply(load(), context(calibration)).module) < 0.7 * plain
