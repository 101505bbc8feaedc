"""Selecting layers, and what is said when nothing is selected."""

from __future__ import annotations

import pytest

from optkit.errors import RecipeError
from optkit.targets import select

NAMES = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")] + [
    "lm_head"
]


def test_linear_names_every_linear_layer():
    assert select(NAMES, ["Linear"], []) == NAMES
    assert select(NAMES, ["Linear"], ["lm_head"]) == NAMES[:-1]


def test_exact_paths_and_patterns_keep_the_models_order():
    assert select(NAMES, ["lm_head", "model.layers.0.mlp.up_proj"], []) == [NAMES[1], "lm_head"]
    assert select(NAMES, [r"re:.*q_proj"], [r"re:model\.layers\.0\."]) == [NAMES[2]]


def test_a_pattern_matches_from_the_start_of_the_path():
    with pytest.raises(RecipeError, match="matches none"):
        select(NAMES, ["re:q_proj"], [])


def test_what_matches_nothing_is_refused_with_near_names():
    with pytest.raises(RecipeError) as caught:
        select(NAMES, ["model.layers.0.mlp.upproj"], [])
    assert str(caught.value) == (
        "targets: matches none of the model's 5 linear layers, found 'model.layers.0.mlp.upproj'; "
        "near names: model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, model.layers.0.self_attn.q_proj"
    )
    with pytest.raises(RecipeError, match="ignore: matches none"):
        select(NAMES, ["Linear"], ["head"])
    with pytest.raises(RecipeError, match="not a regular expression"):
        select(NAMES, ["re:("], [])
    with pytest.raises(RecipeError, match="leave no layer"):
        select(NAMES, ["lm_head"], ["lm_head"])


def test_a_model_without_a_head_may_ignore_it():
    assert select(NAMES[:-1], ["Linear"], ["lm_head"]) == NAMES[:-1]
