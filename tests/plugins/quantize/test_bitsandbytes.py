"""quantize.bitsandbytes: the library's own layers, saved so that plain transformers reads the same numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
from pydantic import ValidationError

from optkit.errors import OptkitError, RecipeError
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_quantize.bitsandbytes import BitsAndBytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it calls torch.jit when it is imported
    bitsandbytes = pytest.importorskip("bitsandbytes")

CONTEXT = TransformContext(lambda *_: None)
FORMATS = [
    {"format": "nf4"},
    {"format": "nf4", "double_quantization": False},
    {"format": "fp4"},
    {"format": "int8"},
    {"format": "int8", "threshold": 0.0},
]
IDS = torch.randint(5, 50, (1, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_the_weights_are_the_library_s_own(tiny_llama, options):
    float_weight = tiny_llama().module.model.layers[0].mlp.up_proj.weight
    layer = BitsAndBytes(**options).apply(tiny_llama(), CONTEXT).module.model.layers[0].mlp.up_proj
    if options["format"] == "int8":
        stored, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(float_weight.half())
        assert torch.equal(layer.weight.data, stored)
        assert torch.equal(layer.weight.SCB, scale)
        return
    double = options.get("double_quantization", True)
    stored, state = bitsandbytes.functional.quantize_4bit(
        float_weight, quant_type=options["format"], compress_statistics=double
    )
    assert torch.equal(layer.weight.data, stored)
    assert layer.weight.quant_state.nested is double
    expected = bitsandbytes.functional.dequantize_4bit(stored, state)
    found = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(found, expected)
    assert 0 < (found - float_weight).norm() / float_weight.norm() < 0.2


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_saved_it_answers_the_same_in_optkit_and_in_plain_transformers(tiny_llama, tmp_path, options):
    from transformers import AutoModelForCausalLM

    model = BitsAndBytes(**options).apply(tiny_llama(), CONTEXT)
    assert model.tags >= {f"weights:bnb-{options['format']}", "weights:float"}
    expected = model.module(IDS).logits
    save_folder(model, tmp_path)
    assert torch.equal(load_folder(tmp_path, tags=model.tags).module(IDS).logits, expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(plain(IDS).logits, expected)
    kinds = {type(layer).__name__ for layer in plain.model.layers.modules() if hasattr(layer, "in_features")}
    assert kinds == {"Linear8bitLt" if options["format"] == "int8" else "Linear4bit"}
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    float_size = 4 * sum(parameter.numel() for parameter in tiny_llama().module.parameters())
    assert size < (0.6 if options["format"] == "int8" else 0.55) * float_size


def test_layers_that_are_left_stay_float_after_loading(tiny_llama, tmp_path):
    model = BitsAndBytes(ignore=("lm_head", "re:.*down_proj")).apply(tiny_llama(), CONTEXT)
    save_folder(model, tmp_path)
    loaded = load_folder(tmp_path, tags=model.tags).module
    assert type(loaded.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert torch.equal(loaded(IDS).logits, model.module(IDS).logits)


def test_an_encoder_too(tiny_bert, tmp_path):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    model = BitsAndBytes().apply(tiny_bert(), CONTEXT)
    expected = model.module(**batch).last_hidden_state
    save_folder(model, tmp_path)
    assert torch.equal(load_folder(tmp_path, tags=model.tags).module(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_the_torch_backend_runs_it(tiny_llama, tmp_path, name):
    from optkit.steps import Limits, Row, StepPlan
    from optkit_backends.torch import Torch

    model = BitsAndBytes(format=name).apply(tiny_llama(), CONTEXT)
    save_folder(model, tmp_path)
    lowered = Torch().lowering(model.tags)[f"weights:bnb-{name}"]
    assert lowered.native
    assert "bitsandbytes" in lowered.kernel
    with Torch().open(tmp_path, tmp_path, Limits(1, 64)) as session:
        row = Row(1, tuple(IDS[0].tolist()), 0, (0, 1), "all")
        [found] = session.execute(StepPlan((row,))).logits
    expected = model.module(IDS).logits[0]
    distance = (torch.from_numpy(found) - expected).norm() / expected.norm()
    assert distance <= lowered.tolerance


def test_a_weight_that_is_not_finite_is_named(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(OptkitError, match=r"model.layers.1.self_attn.q_proj: a weight is not finite"):
        BitsAndBytes().apply(model, CONTEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int8", "double_quantization": True}, "double_quantization goes with format nf4 or fp4"),
        ({"threshold": 3.0}, "threshold goes with format int8"),
        ({"format": "int8", "threshold": -1.0}, "threshold must be 0 or more"),
    ],
)
def test_options_of_another_format_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        BitsAndBytes(**options)


def test_a_tied_head_is_refused_at_plan(tiny_folder):
    from dataclasses import replace

    from optkit.builtin.huggingface import HuggingFace

    card = HuggingFace(model=str(tiny_folder)).inspect()
    BitsAndBytes(ignore=()).check(card)
    with pytest.raises(RecipeError, match="lm_head is tied to the embedding"):
        BitsAndBytes(ignore=()).check(replace(card, tied_head=True))


def test_the_size_estimate_is_near_the_truth(tiny_llama, tiny_folder, tmp_path):
    from optkit.builtin.huggingface import HuggingFace

    card = HuggingFace(model=str(tiny_folder)).inspect()
    for number, options in enumerate(FORMATS):
        step = BitsAndBytes(**options)
        save_folder(step.apply(tiny_llama(), CONTEXT), tmp_path / str(number))
        size = sum(file.stat().st_size for file in (tmp_path / str(number)).glob("*.safetensors"))
        # The tables of 16 and 256 numbers in every layer weigh in a model this small.
        assert 0.8 * size < step.bits_per_weight(card) * card.parameters / 8 < 1.1 * size
