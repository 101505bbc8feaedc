"""The example of images: the model is taught, and the recipe does to it what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from optkit.apply import apply, make_plan
from optkit.plugins import Plugins
from optkit.recipe import load_recipe
from tests.picturing import EXAMPLE, main

RECIPE = EXAMPLE / "recipe.yaml"
PLUGINS = Plugins.load(third_party=False)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with `artifacts/digits`, as the script leaves it."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py"])
        main()
        yield folder


def planned():
    recipe = load_recipe(RECIPE, PLUGINS)
    if reason := recipe.backend.options.unavailable() or recipe.backend.options.uncompilable():
        pytest.skip(f"{recipe.backend.name} {reason}")
    return make_plan(recipe, PLUGINS)


def test_its_recipe_reads_what_the_script_wrote(here):
    plan = planned()
    assert {"task:image-classification", "arch:resnet", "weights:int8-channel"} < plan.tags
    assert len(list(Path("artifacts/digits/test").glob("*/*.png"))) == plan.recipe.evaluation.images == 500


def test_a_second_run_of_the_script_leaves_the_first_alone(here):
    with pytest.raises(SystemExit, match="artifacts/digits: is there already; remove it, or name another folder"):
        main()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_recipe_keeps_its_gates(here):
    artifact = apply(planned(), PLUGINS, Path("artifacts/made"), progress=lambda *_: None).artifact
    metrics = artifact.report()["metrics"]
    assert metrics["accuracy"]["baseline"] > 0.97
    assert metrics["size_bytes"]["ratio"]["value"] < 0.5
