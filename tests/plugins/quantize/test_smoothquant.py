"""quantize.smoothquant against float64, and its effect on models whose activations have outliers."""

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
from optkit.quantized import QuantizedLinear, replace_module
from optkit.schemes import ActivationScheme, WeightScheme
from optkit.transforms import TransformContext
from optkit_quantize.rounding import round_weight
from optkit_quantize.smoothquant import SmoothQuant, rounding_error, smoothing_scale
from optkit_quantize.structure import fold, layout_of
from tests.calibrating import context, distance, texts

WEIGHTS, ACTIVATIONS = WeightScheme(8, None, symmetric=True), ActivationScheme(dynamic=True)


@pytest.fixture
def outlying(tiny_llama):
    """`outlying(inner=False, **config)`: the tiny model with three channels that are 30 times as large, and what reads
    them as much smaller: after the norms, or before o and down."""

    def make(*, inner=False, **config):
        model = tiny_llama(**config)
        for index in range(2):
            for feed in layout_of(model.tags, what="a test", remedy="").feeds(model.module, f"model.layers.{index}"):
                scale = torch.ones(len(model.module.get_submodule(feed.producer).weight))
                scale[:3] = 1 if feed.from_norm == inner else 1 / 30
                fold(model.module, feed, scale)
        return model

    return make


def eight_bits(module: nn.Module) -> nn.Module:
    """With weights by output channel and activations by token."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            rounded = round_weight(layer.weight, WEIGHTS, name=name)
            replace_module(module, name, QuantizedLinear(*rounded, layer.bias, WEIGHTS, ACTIVATIONS))
    return module


@given(
    alpha=st.floats(0, 1),
    kind=st.sampled_from(["normal", "outlier", "dead input", "dead weight", "silent"]),
    seed=st.integers(0, 2**16),
)
def test_the_scale_is_that_of_the_paper(alpha, kind, seed):
    random = np.random.default_rng(seed)
    activation, weight = np.exp(random.normal(size=(2, 8))).astype(np.float32)
    if kind == "outlier":
        activation[1] = 1e4
    elif kind == "dead input":
        activation[1] = 0
    elif kind == "dead weight":
        weight[1] = 0
    elif kind == "silent":
        activation[:] = 0
    scale = smoothing_scale(torch.from_numpy(activation), torch.from_numpy(weight), alpha)
    for channel in range(8):
        x, w = float(activation[channel]), float(weight[channel])
        expected = 1.0 if x == 0 or w == 0 else x**alpha / w ** (1 - alpha)
        assert scale[channel].item() == pytest.approx(expected, rel=1e-5)


def in_eight_bits(values: np.ndarray) -> np.ndarray:
    """Divided in float32: the largest is in the middle of two integers, and its last bit says which one is taken."""
    step = np.abs(values).max() / np.float32(127.5) or np.float32(1)
    return np.clip(np.round(values / step), -128, 127) * np.float64(step)


@given(rows=st.integers(1, 4), seed=st.integers(0, 2**16), zero_row=st.booleans())
@settings(max_examples=30)
def test_the_error_is_that_of_eight_bits(rows, seed, zero_row):
    random = np.random.default_rng(seed)
    sample = (random.normal(size=(5, 8)) * np.exp(random.normal(size=8))).astype(np.float32)
    weights = {name: random.normal(size=(rows, 8)).astype(np.float32) for name in ("a", "b")}
    spread = np.exp(random.normal(size=8)).astype(np.float32)
    if zero_row:
        weights["b"][:] = 0
    expected = 0.0
    for weight in weights.values():
        wrong = size = 0.0
        for x in sample:
            for row in weight:
                exact = x.astype(np.float64) @ row.astype(np.float64)
                wrong += (in_eight_bits(x / spread) @ in_eight_bits(row * spread) - exact) ** 2
                size += exact**2
        expected += wrong / size if size else 0.0
    tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    found = rounding_error(torch.from_numpy(sample), tensors, torch.from_numpy(spread))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("options", [{}, {"alpha": "search"}, {"alpha": 0.8, "inner": True}])
@pytest.mark.parametrize("config", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4, "mlp_bias": True}])
def test_the_model_computes_what_it_did(options, config, outlying):
    calibration = texts(20, 30)
    tokens = calibration.inputs[0]["input_ids"]
    exact, before = outlying(**config).module(tokens)[0], outlying(**config).module
    model = SmoothQuant(**options).apply(outlying(**config), context(calibration))
    assert distance(model.module, exact, tokens) < 1e-5
    assert model.tags == {"task:causal-lm", "arch:llama", "weights:float", "smoothed"}
    layer, original = model.module.model.layers[1], before.model.layers[1]
    assert not torch.equal(layer.mlp.gate_proj.weight, original.mlp.gate_proj.weight)
    assert torch.equal(layer.mlp.down_proj.weight, original.mlp.down_proj.weight) == (not options.get("inner", False))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_smoothed_models_keep_their_outputs_better_in_eight_bits(inner, alpha, outlying):
    tokens = texts(50).inputs[0]["input_ids"]
    exact = outlying(inner=inner).module(tokens)[0]
    plain = distance(eight_bits(outlying(inner=inner).module), exact, tokens)
    smoothed = SmoothQuant(alpha=alpha, inner=inner).apply(outlying(inner=inner), context(texts(60, 60)))
    assert distance(eight_bits(smoothed.module), exact, tokens) < 0.7 * plain


def test_channels_that_are_always_zero_stay_as_they_are(tiny_llama):
    model, calibration = tiny_llama(), texts(20)
    model.module.model.layers[0].input_layernorm.weight[5] = 0
    SmoothQuant().apply(model, context(calibration))
    original = tiny_llama().module.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.module.model.layers[0].self_attn.q_proj.weight[:, 5], original[:, 5])


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_the_same_twice_and_after_a_kill(alpha, outlying, tmp_path):
    calibration, options = texts(20, 30), {"alpha": alpha, "inner": True}
    whole = SmoothQuant(**options).apply(outlying(), context(calibration)).module.state_dict()

    class Killed(Exception):
        pass

    def until_the_second_block(done: int, total: int, what: str) -> None:
        if what == "model.layers.1":
            raise Killed

    stopped = TransformContext(until_the_second_block, calibration, Checkpoint(tmp_path))
    with pytest.raises(Killed):
        SmoothQuant(**options).apply(outlying(), stopped)
    resumed = SmoothQuant(**options).apply(outlying(), context(calibration, Checkpoint(tmp_path))).module.state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_a_weight_that_is_not_finite_is_refused_by_its_own_name(alpha, bad, tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].mlp.up_proj.weight[0, 3] = bad
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.mlp\.up_proj: a weight is not finite"):
        SmoothQuant(alpha=alpha).apply(model, context(texts(9)))


def test_an_encoder_is_refused(tiny_bert):
    shapes = {"linears": {"a": (4, 4)}, "parameters": 16, "bytes_per_parameter": 4, "vocab_size": 8, "hidden_size": 4}
    rest = {"layers": 1, "max_length": 8, "kv_values_per_token": 0, "tied_head": False}
    card = ModelCard("tiny", frozenset({"arch:bert", "weights:float"}), **shapes, **rest)
    for refused in (lambda: SmoothQuant().check(card), lambda: SmoothQuant().apply(tiny_bert(), context(texts(9)))):
        with pytest.raises(RecipeError, match=r"^SmoothQuant folds scales .*, found 'bert'; leave it out$"):
            refused()


def test_no_data_is_refused(tiny_llama):
    with pytest.raises(OptkitError, match="no calibration data"):
        SmoothQuant().apply(tiny_llama(), context(Calibration()))


@pytest.mark.parametrize("options", [{"alpha": 1.1}, {"alpha": -0.1}, {"alpha": "best"}, {"inner": 1}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        SmoothQuant(**options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model_in_eight_bits_predicts_more_alike_when_smoothed(smollm2):
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

    model = load()
    *held_out, _, _, first, second = windows(model.tokenizer, PythonReference(), 8 * 256, 256)
    calibration = Calibration(tuple({"input_ids": torch.tensor([window])} for window in (first, second)))
    exact = predictions(model.module)
    plain = divergence(eight_bits(model.module))
    for options in ({}, {"alpha": "search", "inner": True}):
        smoothed = SmoothQuant(**options).apply(load(), context(calibration)).module
        assert divergence(eight_bits(smoothed)) < 0.9 * plain
