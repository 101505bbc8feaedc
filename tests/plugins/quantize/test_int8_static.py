"""quantize.int8_static: calibrated scales, in language models, encoders and convolutional networks."""

from __future__ import annotations

from dataclasses import replace

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
from optkit.model import Model
from optkit.quantized import (
    ActivationScheme,
    QuantizedConv2d,
    QuantizedLinear,
    WeightScheme,
    quantized_layers,
    round_activations,
)
from optkit.transforms import TransformContext
from optkit_quantize.int8_static import Int8Static

TOKENS = torch.arange(3, 40)[None]
BATCHES = tuple(
    {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} for tokens in (TOKENS, TOKENS.flip(1) + 7)
)
CONTEXT = TransformContext(lambda *_: None, Calibration(BATCHES))
OBSERVERS = [{"observer": "minmax"}, {"observer": "percentile", "percentile": 99.9}, {"observer": "histogram"}, {}]


class Network(nn.Module):
    """Convolutions of all sorts and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8, dilation=2, bias=False)
        self.last = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.last(torch.relu(self.depthwise(torch.relu(self.first(pixels))))))
        return self.head(hidden.mean((2, 3)))


def network():
    torch.manual_seed(0)
    module = Network().eval().requires_grad_(False)
    return Model(module, None, frozenset({"task:vision", "weights:float"}))


PIXELS = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
PICTURES = TransformContext(lambda *_: None, Calibration(({"pixels": PIXELS},)))


def distance(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@settings(max_examples=50)
@given(
    symmetric=st.booleans(),
    low=st.floats(-10, 0),
    width=st.floats(0.1, 20),
    size=st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
def test_inputs_are_rounded_by_one_scale(symmetric, low, width, size, seed):
    high = max(low + width, 0.0)
    scale = np.float32(max(-low, high) / 127.5 if symmetric else (high - low) / 255)
    zero = 0 if symmetric else int(np.clip(np.round(-128 - low / scale), -128, 127))
    values = np.random.default_rng(seed).uniform(2 * low - 1, 2 * high + 1, size).astype(np.float32)
    scheme = ActivationScheme(False, symmetric)
    zero_point = None if symmetric else torch.tensor([zero], dtype=torch.int8)
    found = round_activations(torch.from_numpy(values), scheme, torch.tensor([scale]), zero_point).double().numpy()
    for value, rounded in zip(values.astype(np.float64), found, strict=True):
        quotient = value / float(scale) + zero
        expected = (min(max(round(quotient), -128), 127) - zero) * float(scale)
        tie = abs(abs(quotient - np.floor(quotient)) - 0.5) < 1e-3
        assert abs(rounded - expected) <= (1.01 * scale if tie else 1e-5 * (abs(expected) + scale))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", OBSERVERS, ids=str)
def test_a_language_model(tiny_llama, options, symmetric):
    exact = tiny_llama().module(TOKENS).logits
    step = Int8Static(**options, symmetric=symmetric)
    model = step.apply(tiny_llama(), CONTEXT)
    layers = dict(quantized_layers(model.module))
    assert len(layers) == 14
    for layer in layers.values():
        assert (layer.scheme, layer.activations) == (WeightScheme(8, None, True), ActivationScheme(False, symmetric))
        assert layer.input_scale.shape == (1,)
        assert (layer.input_zero_point is None) == symmetric
    assert {"weights:int8-channel", "activations:int8-static" + ("" if symmetric else "-asym")} <= model.tags
    assert 0 < distance(model.module(TOKENS).logits, exact) < 0.3


def test_each_block_is_calibrated_on_what_the_blocks_before_give_now(tiny_llama):
    model = Int8Static(observer="minmax").apply(tiny_llama(), CONTEXT)
    layer, seen = model.module.model.layers[1].self_attn.q_proj, []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in BATCHES:
        model.module(**batch)
    values = torch.cat([input.flatten() for input in seen]).double()
    scale = (values.max() - values.min()) / 255
    torch.testing.assert_close(layer.input_scale.double(), scale.reshape(1), rtol=1e-4, atol=0)
    assert abs(layer.input_zero_point.item() - (-128 - values.min() / scale).item()) < 0.51


def test_an_encoder(tiny_bert):
    ids = torch.tensor([[5, 200, 31, 7, 90, 12]])
    exact = tiny_bert().module(input_ids=ids).last_hidden_state
    context = replace(CONTEXT, calibration=Calibration(({"input_ids": ids, "attention_mask": torch.ones_like(ids)},)))
    model = Int8Static().apply(tiny_bert(), context)
    assert len(dict(quantized_layers(model.module))) == 13
    assert distance(model.module(input_ids=ids).last_hidden_state, exact) < 0.1


def test_seven_bits_take_a_byte_and_half_of_its_range(tiny_llama):
    model = Int8Static(bits=7).apply(tiny_llama(), CONTEXT)
    layers = dict(quantized_layers(model.module))
    assert {(layer.scheme, layer.weight.dtype) for layer in layers.values()} == {
        (WeightScheme(7, None, True), torch.int8)
    }
    assert max(int(layer.weight.abs().max()) for layer in layers.values()) == 64
    assert {"weights:int7-channel", "activations:int8-static-asym"} <= model.tags


@pytest.mark.parametrize("symmetric", [False, True])
def test_convolutions_and_linear_layers(symmetric):
    exact = network().module(PIXELS)
    model = Int8Static(targets=("Linear", "Conv2d"), ignore=(), symmetric=symmetric).apply(network(), PICTURES)
    module = model.module
    kinds = {name: type(getattr(module, name)) for name in ("first", "depthwise", "last", "head")}
    assert kinds == {
        "first": QuantizedConv2d,
        "depthwise": QuantizedConv2d,
        "last": QuantizedConv2d,
        "head": QuantizedLinear,
    }
    assert distance(module(PIXELS), exact) < 0.05


def test_a_convolution_is_a_product_of_integers():
    float_layer = network().module.first
    layer = Int8Static(targets=("first",), ignore=(), observer="minmax").apply(network(), PICTURES).module.first
    low, high = PIXELS.min().double(), PIXELS.max().double()
    step = (high - low) / 255
    zero = (-128 - low / step).round()
    input = (PIXELS.double() / step + zero).round().clamp(-128, 127) - zero
    weight_step = float_layer.weight.double().abs().amax((1, 2, 3)) / 127.5
    weight = (float_layer.weight.double() / weight_step[:, None, None, None]).round().clamp(-128, 127)
    sums = nn.functional.conv2d(input, weight, stride=2, padding=1)
    expected = sums * (step * weight_step)[:, None, None] + float_layer.bias.double()[:, None, None]
    # A few inputs next to a tie round to the other neighbour in float32.
    error = (layer(PIXELS).double() - expected).abs()
    assert error.median() < 1e-5
    assert error.max() < 0.05


def test_layers_are_chosen_among_both_kinds():
    def chosen(**options):
        return list(Int8Static(**options).chosen(network().module))

    assert chosen() == ["head"]
    assert chosen(targets=("Conv2d",)) == ["first", "depthwise", "last"]
    assert chosen(targets=("Linear", "Conv2d"), ignore=("first", "head")) == ["depthwise", "last"]
    assert chosen(targets=("re:.*st",), ignore=("Linear",)) == ["first", "last"]
    with pytest.raises(RecipeError, match="matches none"):
        chosen(targets=("Conv2d",), ignore=("middle",))


def test_other_padding_than_zeros_is_refused_before_the_work():
    model = network()
    model.module.last = nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(OptkitError, match=r"^last: pads with something else than zeros.*'reflect'; add it to ignore"):
        Int8Static(targets=("Conv2d",), ignore=()).apply(model, PICTURES)
    assert type(model.module.first) is nn.Conv2d


def test_work_that_was_killed_goes_on_where_it_was(tiny_llama, tmp_path):
    whole = Int8Static().apply(tiny_llama(), CONTEXT).module.state_dict()

    class Killed(Exception):
        pass

    def dies(done, total, what):
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        Int8Static().apply(tiny_llama(), replace(CONTEXT, progress=dies, checkpoint=Checkpoint(tmp_path)))
    assert (tmp_path / "block-0.safetensors").is_file()
    told = []
    context = replace(CONTEXT, progress=lambda done, *_: told.append(done), checkpoint=Checkpoint(tmp_path))
    resumed = Int8Static().apply(tiny_llama(), context).module.state_dict()
    assert min(told) == 1
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_planning(tiny_folder):
    from optkit.builtin.huggingface import HuggingFace

    card = HuggingFace(model=str(tiny_folder)).inspect()
    step = Int8Static()
    step.check(card)
    assert step.provides() == {"weights:int8-channel", "activations:int8-static-asym"}
    assert (step.calibration, step.forward_passes()) == (True, 2)
    with pytest.raises(RecipeError, match="matches none"):
        Int8Static(ignore=("nothing",)).check(card)
    # The card knows no convolutions, so their names are checked when the model is there.
    Int8Static(targets=("Linear", "Conv2d"), ignore=("stem",)).check(card)
    assert Int8Static(targets=("Conv2d",)).bits_per_weight(card) == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"observer": "percentile"}, "percentile goes with"),
        ({"percentile": 99.0}, "percentile goes with"),
        ({"observer": "percentile", "percentile": 40.0}, "greater than 50"),
        ({"observer": "entropy"}, "'minmax', 'percentile', 'histogram' or 'mse'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        Int8Static(**options)


def test_weights_that_are_not_finite_are_named(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[0].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(OptkitError, match=r"^model\.layers\.0\.mlp\.(down|gate)_proj: "):
        Int8Static().apply(model, CONTEXT)


def test_no_data_is_said(tiny_llama):
    with pytest.raises(OptkitError, match="no calibration data"):
        Int8Static().apply(tiny_llama(), TransformContext(lambda *_: None))


class Stages(nn.Module):
    """Convolutions in blocks that follow each other, of which the walk keeps checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(3)])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            pixels = stage(pixels)
        return pixels


def test_convolutions_come_back_from_a_checkpoint(tmp_path):
    def model():
        torch.manual_seed(0)
        return Model(Stages().eval().requires_grad_(False), None, frozenset({"weights:float"}))

    step = Int8Static(targets=("Conv2d",), ignore=())
    context = replace(PICTURES, checkpoint=Checkpoint(tmp_path))
    whole = step.apply(model(), context).module
    resumed = step.apply(model(), context).module
    assert {type(stage[0]) for stage in resumed.stages} == {QuantizedConv2d}
    assert torch.equal(resumed(PIXELS), whole(PIXELS))
