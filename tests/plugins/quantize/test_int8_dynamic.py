"""quantize.int8_dynamic against a float64 reference of its rounding, and its effect on models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.errors import OptkitError, RecipeError
from optkit.quantized import ActivationScheme, QuantizedLinear, WeightScheme, quantized_layers, round_activations
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.rtn import RTN

CONTEXT = TransformContext(progress=lambda done, total, what: None)
TOKENS = torch.arange(3, 40)[None]


def rounded(vector, symmetric):
    """One token, one number at a time, in float64: what the product gets, and how far each was from a tie."""
    low, high = min(min(vector), 0.0), max(max(vector), 0.0)
    scale = max(-low, high) / 127.5 if symmetric else (high - low) / 255
    scale = scale or 1.0
    zero = 0 if symmetric else min(max(round(-128 - low / scale), -128), 127)
    quotients = [value / scale + zero for value in vector]
    found = [(min(max(round(quotient), -128), 127) - zero) * scale for quotient in quotients]
    return found, [abs(abs(quotient - np.floor(quotient)) - 0.5) for quotient in quotients], scale


@settings(max_examples=50)
@given(
    shape=st.sampled_from([(1, 1), (3, 7), (2, 3, 16), (1, 5, 64)]),
    kind=st.sampled_from(["normal", "outlier", "zero token", "constant", "positive", "tiny"]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_each_token_is_rounded_by_its_own_scale(shape, kind, symmetric, seed):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if kind == "outlier":
        values[..., 0] = 500
    elif kind == "zero token":
        values[0] = 0
    elif kind == "constant":
        values[:] = -0.75
    elif kind == "positive":
        values = abs(values)
    elif kind == "tiny":
        values *= 1e-20
    scheme = ActivationScheme(dynamic=True, symmetric=symmetric)
    found = round_activations(torch.from_numpy(values), scheme).double().numpy()
    for place in np.ndindex(shape[:-1]):
        wanted, margins, scale = rounded([float(value) for value in values[place]], symmetric)
        # In float32 a quotient next to a half may round to the other neighbour, and so may an asymmetric zero point.
        sure = np.array(margins) > 1e-3
        error = abs(found[place] - wanted)
        assert (error <= 1.01 * scale).all()
        if symmetric:
            assert (error[sure] <= 1e-5 * abs(values[place]).max()).all()


def test_a_layer_is_a_product_of_integers():
    torch.manual_seed(0)
    weight, input = torch.randint(-128, 128, (5, 24), dtype=torch.int8), torch.randn(3, 24)
    scale = torch.rand(5, 1) + 0.5
    layer = QuantizedLinear(weight, scale, None, torch.randn(5), WeightScheme(8, None, True), ActivationScheme(True))
    steps = input.abs().amax(-1, keepdim=True).double() / 127.5
    integers = (input.double() / steps).round().clamp(-128, 127).long()
    expected = (integers @ weight.long().T).double() * steps * scale.double().T + layer.bias.double()
    torch.testing.assert_close(layer(input).double(), expected, rtol=1e-5, atol=1e-4)


def test_weights_and_activations_of_every_linear_but_the_head(tiny_llama):
    exact = tiny_llama().module(TOKENS).logits
    model = Int8Dynamic().apply(tiny_llama(), CONTEXT)
    layers = dict(quantized_layers(model.module))
    assert len(layers) == 14
    assert {(layer.scheme, layer.activations) for layer in layers.values()} == {
        (WeightScheme(8, None, True), ActivationScheme(dynamic=True))
    }
    assert {"weights:int8-channel", "activations:int8-dynamic"} <= model.tags
    assert 0 < ((model.module(TOKENS).logits - exact).norm() / exact.norm()).item() < 0.03


def test_seven_bits_take_a_byte_and_half_of_its_range(tiny_llama):
    model = Int8Dynamic(bits=7).apply(tiny_llama(), CONTEXT)
    layers = dict(quantized_layers(model.module))
    assert {layer.scheme for layer in layers.values()} == {WeightScheme(7, None, True)}
    assert {layer.weight.dtype for layer in layers.values()} == {torch.int8}
    assert max(int(layer.weight.abs().max()) for layer in layers.values()) == 64
    assert "weights:int7-channel" in model.tags


def test_a_zero_point_for_each_token_is_closer_where_all_are_positive(tiny_llama):
    model = Int8Dynamic(symmetric=False).apply(tiny_llama(), CONTEXT)
    assert {layer.activations for _, layer in quantized_layers(model.module)} == {ActivationScheme(True, False)}
    assert "activations:int8-dynamic-asym" in model.tags
    positive = torch.rand(4, 32)
    one, other = (round_activations(positive, ActivationScheme(True, symmetric)) for symmetric in (True, False))
    assert (other - positive).abs().max() < 0.6 * (one - positive).abs().max()


def test_a_token_does_not_see_the_others(tiny_llama):
    module = Int8Dynamic().apply(tiny_llama(), CONTEXT).module
    alone = module(TOKENS[:, :5]).logits
    torch.testing.assert_close(module(TOKENS).logits[:, :5], alone, rtol=1e-3, atol=1e-3)


def test_an_encoder_is_stored_and_read(tiny_bert, tmp_path):
    model = Int8Dynamic(ignore=("pooler.dense",)).apply(tiny_bert(), CONTEXT)
    save_folder(model, tmp_path)
    ids = torch.tensor([[5, 200, 31]])
    again = load_folder(tmp_path).module(input_ids=ids).last_hidden_state
    assert torch.equal(again, model.module(input_ids=ids).last_hidden_state)


def test_equal_inputs_give_equal_bits(tiny_llama):
    one, other = (Int8Dynamic().apply(tiny_llama(), CONTEXT).module(TOKENS).logits for _ in range(2))
    assert torch.equal(one, other)


def test_a_weight_that_is_not_finite_is_named(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.mlp\.up_proj: a weight is not finite"):
        Int8Dynamic().apply(model, CONTEXT)


def test_planning_knows_its_format_and_size(tiny_folder):
    from optkit.builtin.huggingface import HuggingFace

    card = HuggingFace(model=str(tiny_folder)).inspect()
    step = Int8Dynamic()
    step.check(card)
    assert step.provides() == {"weights:int8-channel", "activations:int8-dynamic"}
    assert (step.calibration, step.forward_passes()) == (False, 0)
    assert 8 < step.bits_per_weight(card) < 32
    with pytest.raises(RecipeError, match="matches none"):
        Int8Dynamic(targets=("nothing",)).check(card)


@pytest.mark.slow
def test_a_real_model_keeps_its_perplexity(smollm2):
    from optkit.builtin.gguf import GGUF
    from optkit.builtin.texts import PythonReference
    from optkit.evaluate import windows

    def perplexity(*steps):
        model = GGUF(file=str(smollm2)).load()
        texts = windows(model.tokenizer, PythonReference(), 2048, 512)
        for step in steps:
            model = step.apply(model, CONTEXT)
        losses = []
        with torch.inference_mode():
            for text in texts:
                tokens = torch.tensor([text])
                logits = model.module(input_ids=tokens, use_cache=False).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
        return float(np.exp(np.mean(losses)))

    exact = perplexity()
    assert perplexity(RTN()) < 1.005 * exact
    assert perplexity(Int8Dynamic()) < 1.04 * exact
