"""Rounding: exact, complete, and nothing but the weights."""

import pytest
import torch
from optkit_bfloat16.cast import BFloat16
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optkit.model import Model
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=request.param,
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Model(module, None, frozenset({"task:causal-lm", "arch:llama", "weights:float"}))


def cast(model):
    seen = []
    done = BFloat16().apply(model, TransformContext(lambda *told: seen.append(told)))
    assert seen[-1][0] == seen[-1][1]
    return done


def rounded(tensor):
    """Round to nearest, ties to even, on the bits: the reference."""
    bits = tensor.contiguous().view(torch.int32).to(torch.int64)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16 << 16).to(torch.int32).view(torch.float32)


def test_every_weight_is_rounded_to_nearest_and_nothing_else_changes(model):
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    frequencies = model.module.model.rotary_emb.inv_freq.clone()
    after = cast(model).module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), rounded(before[name]))
    assert torch.equal(model.module.model.rotary_emb.inv_freq, frequencies)


def test_a_model_published_in_bfloat16_is_not_changed(model):
    model.module.to(torch.bfloat16).to(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    after = cast(model).module.state_dict()
    assert all(torch.equal(after[name].float(), before[name]) for name in before)


def test_the_folder_takes_half_and_comes_back_in_float32(model, tmp_path):
    save_folder(model, tmp_path / "before")
    done = cast(model)
    save_folder(done, tmp_path / "after")
    # But for the headers, which are the same size to a few bytes.
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "after")}
    parameters = sum(parameter.numel() for parameter in done.module.parameters())
    assert sizes["before"] - sizes["after"] == pytest.approx(2 * parameters, abs=64)

    loaded = load_folder(tmp_path / "after").module
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    state = done.module.state_dict()
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in loaded.state_dict().items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.module.config.tie_word_embeddings

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert plain.dtype == torch.bfloat16


def test_its_tags_say_what_was_done(model):
    assert cast(model).tags == {"task:causal-lm", "arch:llama", "weights:float", "stored:bfloat16"}
