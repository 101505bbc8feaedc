"""Pooling: every way against its plain formula, and the files that ask for it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from optkit.engine.pooling import Pooling, Preparation, pooling_of, preparation_of
from optkit.errors import DamagedError, RecipeError

HIDDEN = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
TRANSFORMER = {"path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def files(*modules, **config):
    return {"modules.json": json.dumps([TRANSFORMER, *modules]), "1_Pooling/config.json": json.dumps(config)}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mean", HIDDEN.astype(np.float64).mean(axis=0)),
        ("cls", HIDDEN[0]),
        ("lasttoken", HIDDEN[6]),
        ("max", HIDDEN.max(axis=0)),
        ("mean_sqrt_len", HIDDEN.astype(np.float64).sum(axis=0) / 7**0.5),
    ],
)
def test_each_way_is_its_formula(mode, expected):
    found = Pooling((mode,))(HIDDEN)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(Pooling((mode,), normalize=True)(HIDDEN), expected / np.linalg.norm(expected), rtol=1e-5)


def test_the_caller_may_choose_whether_to_normalize():
    assert np.linalg.norm(Pooling()(HIDDEN, normalize=True)) == pytest.approx(1)
    np.testing.assert_array_equal(Pooling(normalize=True)(HIDDEN, normalize=False), Pooling()(HIDDEN))
    assert not Pooling(normalize=True)(np.zeros((2, 3), np.float32)).any()


def test_without_files_it_is_the_mean():
    assert pooling_of({}) == Pooling(("mean",), normalize=False)


def test_the_files_say_how():
    assert pooling_of(files(POOLING, NORMALIZE, pooling_mode_mean_tokens=True)) == Pooling(("mean",), normalize=True)
    assert pooling_of(files(POOLING, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)) == Pooling(("cls",))
    both = pooling_of(files(POOLING, pooling_mode_max_tokens=True, pooling_mode_mean_tokens=True))
    assert both.modes == ("max", "mean")
    assert both(HIDDEN).shape == (10,)
    # As newer versions write them.
    assert pooling_of(files(POOLING, pooling_mode="lasttoken")) == Pooling(("lasttoken",))
    assert pooling_of(files(POOLING, pooling_mode=["cls", "mean"])) == Pooling(("cls", "mean"))


def test_what_optkit_does_not_have_is_refused():
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    with pytest.raises(RecipeError, match=r"2_Dense: has a module after the encoder .*, found 'Dense'"):
        pooling_of(files(POOLING, dense, pooling_mode_mean_tokens=True))
    with pytest.raises(RecipeError, match=r"pools in a way that optkit does not have .*, found 'weightedmean'"):
        pooling_of(files(POOLING, pooling_mode_weightedmean_tokens=True))
    with pytest.raises(RecipeError, match="found 'none'"):
        pooling_of(files(POOLING))
    asked = {"config_sentence_transformers.json": json.dumps({"prompts": {"q": "query: "}, "default_prompt_name": "q"})}
    with pytest.raises(RecipeError, match="leaves its prompt out of the pooling"):
        pooling_of(files(POOLING, pooling_mode="mean", include_prompt=False) | asked)


def test_damaged_files_are_named():
    for broken, words in (
        ({"modules.json": "{"}, "modules.json: not readable JSON"),
        ({"modules.json": "{}"}, "modules.json: not a list of modules"),
        ({"modules.json": json.dumps([POOLING])}, "1_Pooling/config.json: modules.json names it"),
    ):
        with pytest.raises(DamagedError, match=words):
            pooling_of(broken)
    with pytest.raises(DamagedError, match="default_prompt_name is none of prompts, found 'q'"):
        preparation_of({"config_sentence_transformers.json": json.dumps({"default_prompt_name": "q"})})


def test_texts_are_prepared_as_the_files_say():
    assert preparation_of({})("  Hello World ") == "Hello World"
    lower = preparation_of({"sentence_bert_config.json": json.dumps({"do_lower_case": True})})
    assert (lower, lower("Hello World")) == (Preparation(lowercase=True), "hello world")
    asked = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "query"}
    assert preparation_of({"config_sentence_transformers.json": json.dumps(asked)})("Hi") == "query: Hi"
