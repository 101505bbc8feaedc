"""Many processes at once: one artifact at each output, and no step done twice."""

from __future__ import annotations

import os
import shutil

import pytest

from optkit.apply.cache import StepCache
from optkit.artifact import hash_files, open_artifact


def apply_together(watched, recipe, outputs):
    """What each said, by output, and how often each step was made."""
    processes = [watched.start("apply", recipe, "--output", out) for out in outputs]
    said = [(process.communicate(timeout=280), process.returncode) for process in processes]
    assert [code for _, code in said] == [0] * len(outputs), said
    made = [line["step"] for line in watched.lines() if line["event"] == "finished" and not line["cached"]]
    return [out for (out, _), _ in said], made


def test_two_processes_at_one_output_and_a_third_elsewhere(desk, watched):
    for step, _, _ in list(StepCache().entries()):
        if step.name != "benchmark":
            shutil.rmtree(step.data.parent)
    one, other = desk.folder / "one", desk.folder / "other"
    said, made = apply_together(watched, desk.recipe(), [one, other, one])
    assert sorted(made) == sorted({step.name for step, _, _ in StepCache().entries()} - {"benchmark"})
    assert len(made) == 6
    assert ["Already there" in out for out in said].count(True) == 1
    assert "Published" in said[1]
    assert open_artifact(one).report()["metrics"] == open_artifact(other).report()["metrics"]
    assert hash_files(one / "weights") == hash_files(other / "weights")
    assert sorted(os.listdir(desk.folder)) == ["cache", "one", "other", "recipe.yaml"]


@pytest.mark.slow
def test_sixteen_processes_make_one_artifact(desk, watched):
    """From an empty cache, and without transforms: the shortest way to an artifact."""
    shutil.rmtree(desk.folder / "cache")
    out = desk.folder / "out"
    said, made = apply_together(watched, desk.recipe(transforms=[]), [out] * 16)
    assert made == ["save weights", "compile", "quality", "benchmark"]
    assert ["Published" in text for text in said].count(True) == 1
    assert ["Already there" in text for text in said].count(True) == 15
    report = open_artifact(out).report()
    assert report["parity"]["distance"] <= 1e-5
    assert report["metrics"]["kl"]["value"] < 1e-6
    assert sorted(os.listdir(desk.folder)) == ["cache", "out", "recipe.yaml"]
