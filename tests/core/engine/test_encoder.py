"""Embeddings of texts: those of a plain transformers model, whatever the batching strategy does with them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import optkit
from optkit.backends import TensorSession
from optkit.engine.encoder import EncoderText
from optkit.engine.tensors import TensorEngine
from optkit.errors import DamagedError, MachineError, MissingError, RecipeError, RequestError
from optkit.steps import Limits

SENTENCE = "A model reads tokens and answers with the next one while the quick brown fox jumps over the lazy dog"
STRATEGIES = {
    "static": {"max_batch_size": 8},
    "dynamic": {"max_batch_size": 16, "max_queue_delay_ms": 1.0},
    "bucketed": {"max_batch_size": 16, "max_padding": 0.1},
}


def texts(count):
    """Of 1 to 64 words, in no order."""
    random = np.random.default_rng(3)
    return [" ".join(random.choice(SENTENCE.split(), size=random.integers(1, 65))) for _ in range(count)]


def plain(folder, sentences, max_length):
    """Each text alone through transformers: the mean over its tokens, normalized."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, module = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    rows = []
    with torch.inference_mode():
        for sentence in sentences:
            inputs = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=max_length, padding=False)
            mean = module(**inputs).last_hidden_state[0].double().mean(0)
            rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_minilm_gives_the_embeddings_of_transformers(minilm, encoder_artifact, strategy):
    sentences = texts(60)
    path = encoder_artifact(minilm, {strategy: STRATEGIES[strategy]}, 256)
    with optkit.Encoder(path) as encoder:
        found = encoder.encode(sentences)
        assert encoder.truncated == 0
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, plain(minilm, sentences, 256), atol=1e-5)
        age, years, fox = encoder.encode(["How old are you?", "What is your age?", "The fox jumps over a dog."])
        assert age @ years > 0.7 > 0.3 > age @ fox


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_is_that_of_the_texts_and_what_is_long_is_cut(tiny_encoder, encoder_artifact, strategy):
    sentences = texts(50)
    with optkit.Encoder(encoder_artifact(tiny_encoder, {strategy: STRATEGIES[strategy]}, 64)) as encoder:
        found = encoder.encode(sentences)
        np.testing.assert_allclose(found, plain(tiny_encoder, sentences, 64), atol=1e-5)
        lengths = [len(ids) for ids in encoder._text._tokenizer(sentences)["input_ids"]]
        assert encoder.truncated == sum(length > 64 for length in lengths) > 0
        assert max(map(len, encoder.tokenize(sentences))) == encoder.max_length == 64


def test_normalizing_is_up_to_the_files_and_then_to_the_caller(tiny_encoder, encoder_artifact, tmp_path):
    bare = shutil.copytree(tiny_encoder, tmp_path / "bare")
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        (bare / name).unlink()
    sentences = ["one", "two of them"]
    with optkit.Encoder(encoder_artifact(tiny_encoder, {"static": {}}, 64)) as encoder:
        normalized, raw = encoder.encode(sentences), encoder.encode(sentences, normalize=False)
    with optkit.Encoder(encoder_artifact(bare, {"bucketed": {}}, 64)) as encoder:
        np.testing.assert_allclose(encoder.encode(sentences), raw, atol=1e-6)
        np.testing.assert_allclose(encoder.encode(sentences, normalize=True), normalized, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(normalized, axis=1), 1, rtol=1e-6)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)


def test_no_texts_and_texts_without_tokens(tiny_encoder, encoder_artifact):
    with optkit.Encoder(encoder_artifact(tiny_encoder, {"static": {}}, 64)) as encoder:
        assert encoder.encode([]).shape == (0, 32)
        with pytest.raises(RequestError, match="text 1: has no tokens"):
            encoder.encode(["one", " "])
        with pytest.raises(TypeError, match="give a list of strings"):
            encoder.encode("one")


def test_text_is_tokenized_without_the_model(tiny_encoder):
    text = EncoderText(tiny_encoder, 8)
    assert text.tokenize([], cut=False) == []
    [short] = text.tokenize(["fox"], cut=False)
    with pytest.raises(RequestError, match=r"text 3: has \d+ tokens, the model takes 8; shorten it"):
        text.tokenize(["fox", "fox", "fox", SENTENCE], cut=False)
    with pytest.raises(RequestError, match="text 1: has no tokens"):
        text.tokenize(["fox", ""], cut=True)
    assert text.truncated == 0
    first, second = text.tokenize(["fox", SENTENCE], cut=True)
    assert (first, len(second), text.truncated) == (short, 8, 1)


class Faulty(TensorSession):
    """Fails on one token, and asks to be interrupted at another."""

    def __init__(self, inner, bad, stop):
        self.inputs, self.outputs, self._inner, self._bad, self._stop = inner.inputs, inner.outputs, inner, bad, stop

    def run(self, inputs):
        if (inputs["input_ids"] == self._stop).any():
            raise KeyboardInterrupt
        if (inputs["input_ids"] == self._bad).any():
            raise ValueError("a bad token")
        return self._inner.run(inputs)

    def close(self):
        self._inner.close()


def test_a_failure_names_its_text_and_leaves_nothing_behind(tiny_encoder, encoder_artifact):
    with optkit.Encoder(encoder_artifact(tiny_encoder, {"static": {"max_batch_size": 2}}, 64)) as encoder:
        [(bad,), (stop,)] = encoder._text._tokenizer(["X", "Y"])["input_ids"]
        session = Faulty(encoder._session, bad, stop)
        limits = Limits(2, 64)
        encoder._engine = TensorEngine(session, encoder._engine._batcher, limits, 320)
        good = encoder.encode(["one", "two", "three"])
        with pytest.raises(MachineError, match=r"text 3: the model failed \(ValueError: a bad token\)"):
            encoder.encode(["one", "two", "three", "X", "four", "five", "six"])
        assert not encoder._engine.busy
        with pytest.raises(KeyboardInterrupt):
            encoder.encode(["one", "two", "Y", "four", "five"])
        assert not encoder._engine.busy
        np.testing.assert_array_equal(encoder.encode(["one", "two", "three"]), good)


def test_progress_goes_to_standard_error_and_closing_twice_does_nothing(tiny_encoder, encoder_artifact, capsys):
    encoder = optkit.Encoder(encoder_artifact(tiny_encoder, {"static": {}}, 64))
    assert encoder.encode(["one", "two"], progress=True).shape == (2, 32)
    assert capsys.readouterr().out == ""
    encoder.close()
    encoder.close()


def test_what_is_no_encoder_is_refused_before_it_is_opened(tiny_encoder, encoder_artifact, tmp_path):
    with pytest.raises(MissingError, match="no artifact here"):
        optkit.Encoder(tmp_path)
    path = encoder_artifact(tiny_encoder, {"static": {}}, 64)
    manifest = json.loads((path / "manifest.json").read_text())
    facts = {key: manifest[key] for key in manifest if key not in {"format", "digest", "files"}}
    from optkit.artifact import publish, staging

    with staging(tmp_path / "other") as staged:
        shutil.copytree(path / "weights", staged / "weights")
        publish(staged, tmp_path / "other", facts | {"tags": ["task:causal-lm"]})
    with pytest.raises(RecipeError, match=r"other: is no encoder; optkit\.LLM runs a causal language model"):
        optkit.Encoder(tmp_path / "other")


def test_a_configuration_without_a_vocabulary_is_damaged(tmp_path):
    from optkit.engine.encoder import vocabulary_of

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"config\.json: says no vocab_size"):
        vocabulary_of(tmp_path)
