"""Every stored format of quantized layers: exact for us, and read by plain transformers to the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from optkit.builtin.huggingface import HuggingFace
from optkit.errors import DamagedError, OptkitError
from optkit.quantized import (
    ActivationScheme,
    QuantizedConv2d,
    QuantizedLinear,
    WeightScheme,
    quantized_layers,
    replace_module,
)
from optkit.weights import load_folder, save_folder
from optkit_quantize.rounding import round_weight

TOKENS = torch.arange(3, 40)[None]
INT8, INT4, ASYM4 = WeightScheme(8, None, True), WeightScheme(4, 32, True), WeightScheme(4, 32, False)
ASYM8, FP8 = WeightScheme(8, None, False), WeightScheme(8, None, True, "float")
DYNAMIC, STATIC = ActivationScheme(dynamic=True), ActivationScheme(dynamic=False)
DYNAMIC_ASYM, STATIC_ASYM = ActivationScheme(True, symmetric=False), ActivationScheme(False, symmetric=False)
DYNAMIC_FP8, STATIC_FP8 = ActivationScheme(True, type="float"), ActivationScheme(False, type="float")
UNIFORM = {
    "weights alone": ((INT4, None), "pack-quantized"),
    "weights alone, asymmetric": ((ASYM4, None), "pack-quantized"),
    "int8 dynamic": ((INT8, DYNAMIC), "int-quantized"),
    "int8 dynamic asymmetric": ((INT8, DYNAMIC_ASYM), "int-quantized"),
    "int8 static": ((INT8, STATIC), "int-quantized"),
    "int8 static asymmetric": ((INT8, STATIC_ASYM), "int-quantized"),
    "int8 asymmetric weights": ((ASYM8, STATIC_ASYM), "int-quantized"),
    "w4a8 group": ((INT4, DYNAMIC), "int-quantized"),
    "w4a8 channel": ((WeightScheme(4, None, True), DYNAMIC), "int-quantized"),
    "w4a8 asymmetric": ((ASYM4, DYNAMIC), "int-quantized"),
    "fp8 weights alone": ((FP8, None), "float-quantized"),
    "fp8 dynamic": ((FP8, DYNAMIC_FP8), "float-quantized"),
    "fp8 static": ((FP8, STATIC_FP8), "float-quantized"),
}
MIXED = {
    "two widths": ((INT4, None), (INT8, None), ["pack-quantized"] * 2),
    "packed and dynamic": ((INT4, None), (INT8, DYNAMIC), ["pack-quantized", "int-quantized"]),
    "packed asymmetric and dynamic": ((ASYM4, None), (INT8, DYNAMIC), ["int-quantized"] * 2),
    "asymmetric of two widths": ((ASYM4, None), (ASYM8, None), ["int-quantized"] * 2),
    "fp8 and int8": ((FP8, DYNAMIC_FP8), (INT8, STATIC), ["float-quantized", "int-quantized"]),
    "static and dynamic": ((INT8, STATIC_ASYM), (INT8, DYNAMIC), ["int-quantized"] * 2),
    "w4a8 and fp8": ((INT4, DYNAMIC), (FP8, STATIC_FP8), ["int-quantized", "float-quantized"]),
}


def quantized(layer, scheme, activations, name):
    """`layer` rounded; a static scale is that of inputs from -3 to 4."""
    input_scale = input_zero_point = None
    if activations is not None and not activations.dynamic:
        half = 448 if activations.type == "float" else 127.5
        input_scale = torch.tensor([4 / half if activations.symmetric else 7 / 255])
        input_zero_point = None if activations.symmetric else torch.tensor([-19], dtype=torch.int8)
    rounded = round_weight(layer.weight, scheme, name=name)
    return QuantizedLinear(*rounded, layer.bias, scheme, activations, input_scale, input_zero_point)


def quantize(model, schemes, *, skip=("lm_head",)):
    """Every linear layer of the model, with the schemes in turn."""
    linears = [(name, layer) for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear)]
    for index, (name, layer) in enumerate((name, layer) for name, layer in linears if name not in skip):
        replace_module(model.module, name, quantized(layer, *schemes[index % len(schemes)], name))
    return model


def tags_of(schemes):
    return {scheme.tag for pair in schemes for scheme in pair if scheme is not None} | {"weights:float"}


def stored_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def check_round_trip(model, schemes, folder):
    from transformers import AutoModelForCausalLM

    wanted = model.module(TOKENS).logits
    save_folder(model, folder)
    again = load_folder(folder)
    assert torch.equal(again.module(TOKENS).logits, wanted)
    ours, theirs = dict(quantized_layers(model.module)), dict(quantized_layers(again.module))
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert (theirs[name].scheme, theirs[name].activations) == (layer.scheme, layer.activations)
        found, expected = theirs[name].state_dict(), layer.state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype
            # Bytes: float8 has no equality.
            assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), (name, key)
    # Exact for its own rounding too: a step that falls the other way would show in the first digits.
    by_transformers = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(by_transformers(TOKENS).logits, wanted, rtol=1e-4, atol=1e-5)
    card = HuggingFace(model=str(folder)).inspect()
    assert {tag for tag in card.tags if tag.startswith(("weights:", "activations:"))} == tags_of(schemes)
    return card


@pytest.mark.parametrize("config", [{}, {"attention_bias": True}], ids=["plain", "bias"])
@pytest.mark.parametrize(("schemes", "format"), UNIFORM.values(), ids=list(UNIFORM))
def test_one_scheme(tiny_llama, tmp_path, schemes, format, config):
    float_card = tiny_llama(**config)
    float_card.module.save_pretrained(tmp_path / "float")
    card = check_round_trip(quantize(tiny_llama(**config), [schemes]), [schemes], tmp_path / "quantized")
    assert stored_config(tmp_path / "quantized")["format"] == format
    plain = HuggingFace(model=str(tmp_path / "float")).inspect()
    assert (card.parameters, dict(card.linears)) == (plain.parameters, dict(plain.linears))


@pytest.mark.parametrize(("one", "other", "formats"), MIXED.values(), ids=list(MIXED))
def test_several_schemes(tiny_llama, tmp_path, one, other, formats):
    check_round_trip(quantize(tiny_llama(), [one, other]), [one, other], tmp_path)
    stored = stored_config(tmp_path)
    assert [group["format"] for group in stored["config_groups"].values()] == formats
    assert stored["format"] == (formats[0] if len(set(formats)) == 1 else "mixed-precision")


def test_a_quantized_head(tiny_llama, tmp_path):
    schemes = (INT8, DYNAMIC)
    model = quantize(tiny_llama(), [schemes], skip=())
    assert isinstance(model.module.lm_head, QuantizedLinear)
    check_round_trip(model, [schemes], tmp_path)


def test_what_vllm_expects_of_each_tensor(tiny_llama, tmp_path):
    save_folder(quantize(tiny_llama(), [(INT8, STATIC_ASYM), (FP8, STATIC_FP8), (INT4, DYNAMIC)]), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    shapes = {
        key.rpartition(".")[2]: (tensor.dtype, tuple(tensor.shape))
        for key, tensor in state.items()
        if ".0.self_attn.q_proj." in key
    }
    assert shapes == {
        "weight": (torch.int8, (64, 64)),
        "weight_scale": (torch.float32, (64, 1)),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int8, (1,)),
    }
    assert state["model.layers.0.self_attn.k_proj.weight"].dtype == torch.float8_e4m3fn
    # Four bits with activations are whole bytes: so does compressed-tensors, and vLLM packs them itself.
    assert state["model.layers.0.self_attn.v_proj.weight"].dtype == torch.int8
    assert state["model.layers.0.self_attn.v_proj.weight_scale"].shape == (32, 2)


@pytest.mark.parametrize(
    ("schemes", "by_forward"),
    [
        ([(INT8, None)], True),
        ([(ASYM4, None)], True),
        ([(INT8, DYNAMIC)], False),
        ([(INT8, STATIC_ASYM)], False),
        ([(FP8, STATIC_FP8)], False),
        ([(INT8, None), (ASYM4, None)], False),
    ],
    ids=str,
)
def test_encoders(tiny_bert, tmp_path, schemes, by_forward):
    from transformers import AutoModel

    ids = torch.tensor([[5, 200, 31, 7, 90, 12]])
    model = quantize(tiny_bert(), schemes)
    wanted = model.module(input_ids=ids).last_hidden_state
    save_folder(model, tmp_path)
    assert torch.equal(load_folder(tmp_path).module(input_ids=ids).last_hidden_state, wanted)
    theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    # sentence-transformers calls `forward` itself, which only float weights survive.
    found = (theirs.forward if by_forward else theirs)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert ("dequantize" in stored_config(tmp_path)) == by_forward


def test_files_beside_the_weights_do_not_ask_for_float_weights(tiny_llama, tmp_path):
    from dataclasses import replace

    model = quantize(replace(tiny_llama(), files={"notes.json": "{}"}), [(INT8, None)])
    save_folder(model, tmp_path)
    assert "dequantize" not in stored_config(tmp_path)
    assert (tmp_path / "notes.json").read_text() == "{}"


def test_a_folder_of_bfloat16_scales_loads_in_float32(tiny_llama, tmp_path):
    from safetensors.torch import save_file

    save_folder(quantize(tiny_llama(), [(INT8, STATIC)]), tmp_path)
    file = tmp_path / "model.safetensors"
    halved = {k: t.bfloat16() if t.is_floating_point() else t for k, t in load_file(file).items()}
    save_file(halved, file, {"format": "pt"})
    model = load_folder(tmp_path)
    assert {t.dtype for t in model.module.state_dict().values()} == {torch.float32, torch.int8}
    assert torch.isfinite(model.module(TOKENS).logits).all()


def test_targets_of_others_are_understood(tiny_llama, tmp_path):
    """llm-compressor names layers by patterns."""
    model = quantize(tiny_llama(), [(INT8, DYNAMIC)])
    wanted = model.module(TOKENS).logits
    save_folder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = [r"re:.*_proj$"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_folder(tmp_path).module(TOKENS).logits, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "marlin-24"}, "stored as marlin-24"),
        ({"weights": {"strategy": "tensor"}}, "a scale for each tensor"),
        ({"input_activations": {"strategy": "tensor", "dynamic": True}}, "token by token"),
        ({"input_activations": {"num_bits": 4}}, "8 bits"),
        ({"output_activations": {"num_bits": 8}}, "rounds its output"),
        ({"targets": ["re:nothing"]}, "no config group"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_named(tiny_llama, tmp_path, change, words):
    save_folder(quantize(tiny_llama(), [(INT8, DYNAMIC)]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = config["quantization_config"]
    for key, value in change.items():
        if key == "format":
            stored[key] = value
        elif key == "targets":
            stored["config_groups"]["group_0"][key] = value
        else:
            stored["config_groups"]["group_0"][key] = (stored["config_groups"]["group_0"][key] or {}) | value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedError, match=words):
        load_folder(tmp_path)
    if "targets" not in change:
        assert "weights:compressed-tensors" in HuggingFace(model=str(tmp_path)).inspect().tags


def test_quantized_embeddings_are_refused(tiny_llama, tmp_path):
    from safetensors.torch import save_file

    save_folder(quantize(tiny_llama(), [(INT8, DYNAMIC)]), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.embed_tokens.weight_scale": torch.ones(320, 1)}, file, {"format": "pt"})
    with pytest.raises(DamagedError, match=r"model\.embed_tokens is quantized, and no linear layer"):
        load_folder(tmp_path)


def test_a_quantized_convolution_has_no_format(tiny_llama, tmp_path):
    model = tiny_llama()
    convolution = torch.nn.Conv2d(2, 3, 3)
    weight, scale, _ = round_weight(convolution.weight.flatten(1), INT8)
    model.module.patch = QuantizedConv2d(convolution, weight.reshape(convolution.weight.shape), scale, None, None, INT8)
    with pytest.raises(OptkitError, match=r"^patch: a weights folder has no format for it"):
        save_folder(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
