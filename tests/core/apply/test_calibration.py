"""Transforms that learn from data: what they get, when they are made again, and where they go on after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from optkit.apply import make_plan
from optkit.apply.cache import StepCache
from optkit.errors import DamagedError, RecipeError
from optkit.locations import cache_root
from optkit.plugins import Plugins
from optkit.recipe import bind_recipe, load_recipe

LEARNER = """
import json, os, signal
from typing import ClassVar
import torch
from optkit.blockwise import walk
from optkit.hookspecs import hookimpl
from optkit.transforms import Transform

class Shrink(Transform):
    calibration: ClassVar[bool] = True
    factor: float = 0.5

    def provides(self):
        return frozenset()

    def apply(self, model, context):
        ids = [batch["input_ids"][0].tolist() for batch in context.calibration.inputs]
        chosen = [name for name, layer in model.module.named_modules() if name.endswith("down_proj")]
        for block in walk(model.module, context, chosen):
            with open(os.environ["LEARNT"], "a") as log:
                log.write(json.dumps({"block": block.path, "ids": ids, "device": context.device}) + "\\n")
            if block.path == os.environ.get("DIE_AT"):
                os.kill(os.getpid(), signal.SIGKILL)
            for name in block.names:
                model.module.get_submodule(name).weight.mul_(self.factor)
        return model

@hookimpl
def register_transforms():
    return {"test.shrink": Shrink}
"""
TRANSFORMS = [{"test.shrink": {}}]
CALIBRATION = {"samples": 6, "sequence_length": 48}


@pytest.fixture
def learnt(install, tmp_path, monkeypatch):
    """`learnt()`: what the transform wrote down, a dict for each block that it worked on."""
    install("optkit_learn", LEARNER)
    log = tmp_path / "learnt.jsonl"
    monkeypatch.setenv("LEARNT", str(log))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def tokens_of_evaluation(desk) -> list[list[int]]:
    from transformers import AutoTokenizer

    from optkit.builtin.texts import TextFile
    from optkit.evaluate import windows

    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    return [list(window) for window in windows(tokenizer, TextFile(path=str(desk.text)), 256, 64)]


def test_a_transform_gets_windows_that_evaluation_does_not_use(desk, watched, run, events, learnt):
    same = {"text_file": {"path": str(desk.text)}}
    recipe = desk.recipe(transforms=TRANSFORMS, calibration=CALIBRATION)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, desk.folder / "out", [events(stop_at="1 test.shrink: quality")], third_party=True)
    first = learnt()[0]
    assert first["device"] in ("cpu", "cuda")
    assert [len(ids) for ids in first["ids"]] == [48] * 6
    runs = {tuple(window[i : i + 32]) for window in tokens_of_evaluation(desk) for i in range(33)}
    assert not any(tuple(ids[i : i + 32]) in runs for ids in first["ids"] for i in range(17))
    # The very text of the evaluation, which repeats itself, has nothing else to learn from.
    recipe = desk.recipe(transforms=TRANSFORMS, calibration=CALIBRATION | {"dataset": same, "sequence_length": 64})
    process = watched.start("apply", recipe, "--output", desk.folder / "other")
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 2
    assert "that share text with the evaluation's, found 6; lower calibration.samples" in errors


def test_a_killed_transform_goes_on_at_the_block_where_it_was(desk, watched, run, events, learnt, monkeypatch):
    recipe = desk.recipe(transforms=TRANSFORMS, calibration=CALIBRATION)
    monkeypatch.setenv("DIE_AT", "model.layers.1")
    process = watched.start("apply", recipe, "--output", desk.folder / "out")
    _, errors = process.communicate(timeout=250)
    assert process.returncode == -signal.SIGKILL
    assert "tokens are few for layers with 128 input features" in errors
    assert [seen["block"] for seen in learnt()] == ["model.layers.0", "model.layers.1"]
    [unfinished] = (cache_root() / "unfinished").iterdir()
    monkeypatch.delenv("DIE_AT")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, desk.folder / "out", [events(stop_at="1 test.shrink: quality")], third_party=True)
    assert [seen["block"] for seen in learnt()][2:] == ["model.layers.1"]
    assert not unfinished.exists()
    [made] = (step.data for step, _, _ in StepCache().entries() if step.name == "1 test.shrink")
    halved, before = loaded(made), loaded(desk.model)
    for name, tensor in before.items():
        factor = 0.5 if name.endswith("down_proj.weight") else 1
        assert (halved[name] == tensor * factor).all(), name


def loaded(folder: Path):
    from safetensors.torch import load_file

    [file] = folder.rglob("model.safetensors")
    return load_file(file)


@pytest.fixture
def bound(desk, learnt):
    """`bound(**keys)` reads and plans a recipe with these keys."""

    def make(**keys):
        plugins = Plugins.load()
        return make_plan(load_recipe(desk.recipe(**{"transforms": TRANSFORMS} | keys), plugins), plugins)

    return make


def test_the_default_is_filled_in_where_a_transform_needs_it_and_nowhere_else(bound):
    plan = bound(calibration=None)
    asked = plan.recipe.calibration
    assert (asked.dataset.name, asked.samples, asked.sequence_length) == ("python_reference", 128, 512)
    assert plan.recipe.resolved()["calibration"] == {
        "dataset": {"python_reference": {}},
        "samples": 128,
        "sequence_length": 512,
    }
    assert bound(transforms=[]).recipe.resolved()["calibration"] is None


def test_a_resolved_recipe_with_calibration_binds_to_an_equal_one(bound):
    from optkit.binding import from_data

    recipe = bound(calibration=CALIBRATION).recipe
    assert bind_recipe(from_data(recipe.resolved()), Plugins.load()) == recipe


def test_a_section_that_nothing_uses_is_refused(bound):
    with pytest.raises(RecipeError, match="calibration: no transform of this recipe runs the model on data; remove it"):
        bound(transforms=[], calibration=CALIBRATION)


def test_samples_are_no_longer_than_the_model_can_read(bound):
    [warning] = bound(calibration={"samples": 1, "sequence_length": 4096}).warnings
    assert "calibration: 256 tokens are few" in warning


@pytest.mark.parametrize(("content", "message"), [(b"", "at most 0 tokens"), (b"a few words", "at most 13 tokens")])
def test_too_little_text_is_refused_when_the_recipe_is_read(bound, tmp_path, content, message):
    file = tmp_path / "short.txt"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"calibration.samples: the dataset has {message} of text, found 6; lower"):
        bound(calibration=CALIBRATION | {"dataset": {"text_file": {"path": str(file)}}})


def test_what_is_no_text_is_refused_when_the_recipe_is_read(bound, tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(b"\x89PNG\xff")
    with pytest.raises(DamagedError, match=r"recipe.yaml:\d+:\d+: .*picture.png: not a readable UTF-8 text file"):
        bound(calibration=CALIBRATION | {"dataset": {"text_file": {"path": str(file)}}})


def test_few_tokens_are_warned_of(bound):
    [warning] = bound(calibration={"samples": 8, "sequence_length": 32}).warnings
    assert warning.endswith(
        "calibration: 256 tokens are few for layers with 128 input features, quality may suffer; raise samples to 16"
    )
    assert bound(calibration={"samples": 16, "sequence_length": 32}).warnings == ()


def test_more_data_is_more_time_and_memory(bound):
    few, many = (bound(calibration={"samples": n, "sequence_length": 128}).estimate for n in (16, 512))
    assert many.seconds > few.seconds
    assert many.memory_bytes > few.memory_bytes
