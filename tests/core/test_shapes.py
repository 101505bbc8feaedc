"""Models whose layers differ in shape: what their configuration says, and that they come back from a folder."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from optkit.builtin.huggingface import HuggingFace
from optkit.errors import DamagedError, OptkitError
from optkit.schemes import SHAPES_ENTRY
from optkit.shapes import describe
from optkit.weights import load_folder, save_folder
from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts
from tests.shaping import behead, encoder_block, factored, narrow

IDS = torch.arange(3, 20)[None]


def again(model, folder):
    """Saved, and loaded by optkit; its outputs are those of before."""
    exact = model.module(IDS)[0]
    save_folder(model, folder)
    loaded = load_folder(folder)
    # Not bit for bit: where a tensor lies in memory decides how some kernels sum.
    torch.testing.assert_close(loaded.module(IDS)[0], exact)
    return loaded


def entry(folder):
    return json.loads((folder / "config.json").read_text()).get(SHAPES_ENTRY)


def test_a_model_as_its_configuration_has_it_gets_no_entry(tiny_llama, tiny_bert, tmp_path):
    for name, model in (("llama", tiny_llama()), ("bert", tiny_bert())):
        again(model, tmp_path / name)
        assert entry(tmp_path / name) is None


def test_layers_of_one_new_shape_load_in_transformers(tiny_llama, tmp_path):
    model = tiny_llama()
    for layer in model.module.model.layers:
        narrow(layer.mlp, 48)
        behead(layer.self_attn, 2, 1)
    exact = model.module(IDS)[0]
    again(model, tmp_path)
    assert entry(tmp_path) is None
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (plain.config.intermediate_size, plain.config.num_attention_heads) == (48, 2)
    torch.testing.assert_close(plain(IDS)[0], exact)


def test_fewer_layers_load_in_transformers(tiny_llama, tmp_path):
    model = tiny_llama(num_hidden_layers=3)
    layers = model.module.model.layers
    model.module.model.layers = nn.ModuleList([layers[0], layers[2]])
    layers[2].self_attn.layer_idx = 1
    exact = model.module(IDS)[0]
    again(model, tmp_path)
    torch.testing.assert_close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS)[0], exact)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    widths=st.lists(st.integers(1, 128), min_size=2, max_size=2),
    heads=st.lists(st.sampled_from([(4, 2), (2, 2), (2, 1), (1, 1), (3, 1)]), min_size=2, max_size=2),
    tied=st.booleans(),
)
def test_layers_of_any_shapes_come_back(tiny_llama, tmp_path_factory, widths, heads, tied):
    folder = tmp_path_factory.mktemp("shaped")
    model = tiny_llama(tie_word_embeddings=tied)
    for layer, width, (queries, keys) in zip(model.module.model.layers, widths, heads, strict=True):
        narrow(layer.mlp, width)
        behead(layer.self_attn, queries, keys)
    loaded = again(model, folder)
    # Llama's configuration wants heads that divide the width, here 64.
    assert (entry(folder) is None) == (len(set(widths)) == len(set(heads)) == 1 and heads[0] != (3, 1))
    assert ("shape:pruned" in loaded.tags) == (entry(folder) is not None)
    card = HuggingFace(model=str(folder)).inspect()
    assert ("shape:pruned" in card.tags) == (entry(folder) is not None)
    assert card.kv_values_per_token == 2 * 16 * sum(keys for _, keys in heads)
    assert card.linears["model.layers.1.mlp.down_proj"] == (64, widths[1])


def test_an_encoder_of_several_shapes_comes_back(tiny_bert, tmp_path):
    model = tiny_bert()
    encoder_block(model.module.encoder.layer[1], width=24, heads=1)
    loaded = again(model, tmp_path)
    assert entry(tmp_path)["encoder.layer.1.attention.self"] == {"num_attention_heads": 1, "all_head_size": 8}
    assert loaded.module.encoder.layer[1].attention.self.num_attention_heads == 1


def test_layers_of_low_rank_come_back_float_and_quantized(tiny_llama, tmp_path):
    model = tiny_llama()
    factored(model.module, "model.layers.0.mlp.down_proj", 5)
    factored(model.module, "model.layers.1.self_attn.k_proj", 16)
    loaded = again(model, tmp_path / "float")
    assert loaded.module.model.layers[0].mlp.down_proj.rank == 5
    assert entry(tmp_path / "float") == {
        "model.layers.0.mlp.down_proj": {"rank": 5},
        "model.layers.1.self_attn.k_proj": {"rank": 16},
    }
    card = HuggingFace(model=str(tmp_path / "float")).inspect()
    assert card.linears["model.layers.0.mlp.down_proj.0"] == (5, 128)
    assert card.kv_values_per_token == 2 * 2 * 32
    again(RTN(bits=8).apply(loaded, context(texts())), tmp_path / "quantized")


def test_quantized_layers_of_several_shapes_come_back(tiny_llama, tmp_path):
    model = tiny_llama()
    narrow(model.module.model.layers[0].mlp, 64)
    again(RTN(bits=4, granularity="group", group_size=16).apply(model, context(texts())), tmp_path)
    assert entry(tmp_path)["model.layers.0.mlp.down_proj"] == {"in_features": 64}


def test_transformers_refuses_several_shapes_instead_of_loading_some_weights(tiny_llama, tmp_path):
    model = tiny_llama()
    narrow(model.module.model.layers[0].mlp, 64)
    save_folder(model, tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_shape_that_nothing_says_is_refused(tiny_llama):
    module = tiny_llama().module
    module.model.norm.weight = nn.Parameter(torch.ones(63), requires_grad=False)
    with pytest.raises(OptkitError, match=r"model\.norm\.weight: its configuration gives \(64,\)"):
        describe(module)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model.layers.7.mlp": {"intermediate_size": 3}}, "names model.layers.7.mlp, which is not in the model"),
        ({"model.layers.0.mlp": {"forward": 3}}, "gives model.layers.0.mlp forward = 3, which is no size"),
        ({"model.layers.0.mlp.up_proj": {"out_features": "3"}}, "out_features = '3', which is no size"),
        ({"model.layers.0.mlp.up_proj": {"out_features": 0}}, "out_features = 0, which is no size"),
        ({"model.layers.0.mlp": {"rank": 3}}, "gives model.layers.0.mlp rank = 3"),
        ({"model.embed_tokens": {"num_embeddings": 3}}, "gives model.embed_tokens sizes, and it is no linear layer"),
        ({"model.layers.0.mlp.up_proj": {"out_features": 3}}, "size mismatch"),
        ({"model.layers.0.mlp.up_proj": 3}, "holds no sizes"),
        ([], "holds no sizes"),
    ],
)
def test_a_wrong_entry_is_refused(tiny_folder, tmp_path, wrong, said):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {SHAPES_ENTRY: wrong}))
    with pytest.raises(DamagedError, match=said):
        load_folder(folder)
