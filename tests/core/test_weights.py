"""The weights folder: exact for us, and for plain transformers."""

from __future__ import annotations

import pytest
import torch

from optkit.builtin.huggingface import HuggingFace
from optkit.errors import DamagedError, MissingError
from optkit.quantized import quantized_layers
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_quantize.rtn import RTN

CONTEXT = TransformContext(progress=lambda done, total, what: None)
TOKENS = torch.arange(3, 40)[None]
OPTIONS = [
    {},
    {"ignore": ()},
    {"bits": 4, "granularity": "group", "group_size": 32},
    {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False},
    {"bits": 3, "symmetric": False, "ignore": ("lm_head", r"re:.*\.0\.mlp.*")},
]


def distance(actual, wanted):
    return ((actual - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_round_trip_is_exact_here_and_in_transformers(tiny_llama, tmp_path, options, config):
    from transformers import AutoModelForCausalLM

    model = RTN(**options).apply(tiny_llama(**config), CONTEXT)
    wanted = model.module(TOKENS).logits
    save_folder(model, tmp_path)
    again = load_folder(tmp_path, tags=model.tags)
    assert torch.equal(again.module(TOKENS).logits, wanted)
    assert [name for name, _ in quantized_layers(again.module)] == [name for name, _ in quantized_layers(model.module)]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert distance(theirs(TOKENS).logits, wanted) < 1e-5
    card = HuggingFace(model=str(tmp_path)).inspect()
    assert RTN(**options).provides() <= card.tags


def test_layers_of_several_schemes(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = RTN(bits=4, granularity="group", group_size=32, targets=(r"re:.*mlp.*",)).apply(tiny_llama(), CONTEXT)
    model = RTN(bits=8, targets=(r"re:.*self_attn.*",)).apply(model, CONTEXT)
    wanted = model.module(TOKENS).logits
    save_folder(model, tmp_path)
    assert torch.equal(load_folder(tmp_path).module(TOKENS).logits, wanted)
    assert distance(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, wanted) < 1e-5


def test_float_models_round_trip(tiny_llama, tmp_path):
    for tied in (False, True):
        model = tiny_llama(tie_word_embeddings=tied)
        save_folder(model, tmp_path / str(tied))
        again = load_folder(tmp_path / str(tied))
        assert torch.equal(again.module(TOKENS).logits, model.module(TOKENS).logits)
        assert again.tags == {"task:causal-lm", "arch:llama", "weights:float"}
        assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_holds_no_pickle(tiny_llama, tmp_path):
    save_folder(RTN().apply(tiny_llama(), CONTEXT), tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_wrong_folders_are_refused(tiny_llama, tmp_path):
    with pytest.raises(MissingError, match=r"no config\.json"):
        load_folder(tmp_path)
    save_folder(RTN().apply(tiny_llama(), CONTEXT), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DamagedError, match="cannot be loaded"):
        load_folder(tmp_path)
