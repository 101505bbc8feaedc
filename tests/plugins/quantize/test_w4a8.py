"""quantize.w4a8: integers of four bits, stored as bytes, under activations of eight."""

from __future__ import annotations

import pytest
import torch

from optkit.builtin.huggingface import HuggingFace
from optkit.errors import OptkitError, RecipeError
from optkit.quantized import ActivationScheme, WeightScheme, quantized_layers
from optkit.transforms import TransformContext
from optkit.weights import save_folder
from optkit_quantize.rtn import RTN
from optkit_quantize.w4a8 import W4A8

CONTEXT = TransformContext(progress=lambda done, total, what: None)
TOKENS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("group_size", [32, None])
def test_weights_are_those_of_rounding_to_nearest(tiny_llama, group_size):
    model = W4A8(group_size=group_size).apply(tiny_llama(), CONTEXT)
    grouping = {} if group_size is None else {"granularity": "group", "group_size": group_size}
    alone = dict(quantized_layers(RTN(bits=4, **grouping).apply(tiny_llama(), CONTEXT).module))
    for name, layer in quantized_layers(model.module):
        assert torch.equal(layer.weight, alone[name].weight)
        assert torch.equal(layer.scale, alone[name].scale)
        assert layer.scheme == WeightScheme(4, group_size, True)
        assert layer.activations == ActivationScheme(dynamic=True)
        assert -8 <= layer.weight.min() <= layer.weight.max() <= 7
    granularity = "channel" if group_size is None else "group"
    assert {f"weights:int4-{granularity}", "activations:int8-dynamic"} <= model.tags


def test_most_of_the_error_is_that_of_the_weights(tiny_llama):
    exact = tiny_llama().module(TOKENS).logits

    def distance(step):
        logits = step.apply(tiny_llama(), CONTEXT).module(TOKENS).logits
        return ((logits - exact).norm() / exact.norm()).item()

    alone = distance(RTN(bits=4, granularity="group", group_size=32))
    both = distance(W4A8(group_size=32))
    assert both != alone
    assert both < 1.3 * alone


def test_the_planned_size_is_the_stored_one(tiny_llama, tiny_folder, tmp_path):
    step = W4A8(group_size=32)
    card = HuggingFace(model=str(tiny_folder)).inspect()
    step.check(card)
    save_folder(step.apply(tiny_llama(), CONTEXT), tmp_path)
    planned = step.bits_per_weight(card) * card.parameters / 8
    # Names and shapes take the rest.
    assert planned < (tmp_path / "model.safetensors").stat().st_size < 1.05 * planned


def test_a_group_size_that_does_not_divide_is_refused_before_the_work(tiny_folder):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    with pytest.raises(RecipeError, match=r"group_size does not divide .* found 48"):
        W4A8(group_size=48).check(card)


def test_a_weight_that_is_not_finite_is_named(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(OptkitError, match=r"^model\.layers\.0\.mlp\.down_proj: a weight is not finite"):
        W4A8().apply(model, CONTEXT)
