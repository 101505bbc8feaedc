"""What is done again when something changes, what is taken from the cache, and what observers are told of it."""

from __future__ import annotations

import logging
import os
import shutil
from typing import ClassVar

import pytest

from optkit.apply.cache import StepCache
from optkit.artifact import hash_files, open_artifact
from optkit.errors import MachineError
from optkit.hookspecs import hookimpl

STEPS = [
    "1 prune.magnitude",
    "1 prune.magnitude: quality",
    "2 quantize.rtn",
    "2 quantize.rtn: quality",
    "compile",
    "quality",
    "benchmark",
]


def test_every_step_is_told_of_in_order(finished):
    assert finished.events.started == STEPS
    assert finished.events.finished == [(step, False) for step in STEPS]


def redone(run, events, recipe, out):
    """Steps made and found until the benchmark, where the user interrupts, because it takes the longest."""
    told = events(stop_at="benchmark")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, [told])
    assert not out.exists()
    assert not [name for name in os.listdir(out.parent) if name.startswith(".")]
    return told.made, told.found


def test_a_changed_option_of_the_second_transform_leaves_the_first_alone(desk, run, events):
    changed = desk.recipe(transforms=[{"prune.magnitude": {"sparsity": 0.3}}, {"quantize.rtn": {"bits": 4}}])
    made, found = redone(run, events, changed, desk.folder / "out")
    assert found == STEPS[:2]
    assert made == STEPS[2:6]


def test_changed_evaluation_settings_measure_again_and_transform_nothing(desk, run, events):
    dataset = {"text_file": {"path": str(desk.text)}}
    changed = desk.recipe(evaluation={"dataset": dataset, "tokens": 320, "context_length": 64})
    made, found = redone(run, events, changed, desk.folder / "out")
    assert found == ["1 prune.magnitude", "2 quantize.rtn", "compile"]
    assert made == ["1 prune.magnitude: quality", "2 quantize.rtn: quality", "quality"]


def test_a_changed_text_under_the_same_name_measures_again(desk, run, events):
    text = desk.folder / "mine.txt"
    shutil.copyfile(desk.text, text)
    keys = {"dataset": {"text_file": {"path": str(text)}}, "tokens": 256, "context_length": 64}
    redone(run, events, desk.recipe(evaluation=keys), desk.folder / "out")
    assert redone(run, events, desk.recipe(evaluation=keys), desk.folder / "out") == ([], STEPS[:6])
    text.write_text(text.read_text().replace("France", "Norway"))
    made, found = redone(run, events, desk.recipe(evaluation=keys), desk.folder / "out")
    assert made == ["1 prune.magnitude: quality", "2 quantize.rtn: quality", "quality"]
    assert found == ["1 prune.magnitude", "2 quantize.rtn", "compile"]


def test_a_metric_installed_since_gets_its_figure(desk, run, events, finished):
    from optkit.builtin.quality import Perplexity

    class WithMetric(events):
        @hookimpl
        def register_metrics(self):
            return {"perplexity_too": Perplexity}

    told = WithMetric(stop_at="benchmark")
    with pytest.raises(KeyboardInterrupt):
        run(desk.recipe(), desk.folder / "out", [told])
    assert told.made == ["1 prune.magnitude: quality", "2 quantize.rtn: quality", "quality"]
    told = WithMetric()  # a new metric of quality is no reason to repeat the benchmark
    report = run(desk.recipe(gates=[{"metric": "perplexity_too", "at_most": "2x"}]), desk.folder / "out", [told]).report
    assert told.made == []
    assert report["metrics"]["perplexity_too"] == report["metrics"]["perplexity"]


def test_name_and_gates_decide_no_step(desk, run, events):
    told = events()
    run(desk.recipe(name="other", gates=[{"metric": "kl", "at_most": 1}]), desk.folder / "out", [told])
    assert told.finished == [(step, True) for step in STEPS]


def flip(file, after=b""):
    """Flip the lowest bit of the byte that follows `after`, or of the one in the middle."""
    content = bytearray(file.read_bytes())
    content[content.index(after) + len(after) if after else len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "weights": lambda step: flip(step / "data/model.safetensors"),
    "config": lambda step: flip(step / "data/config.json"),
    "file missing": lambda step: (step / "data/tokenizer.json").unlink(),
    "file added": lambda step: (step / "data/pytorch_model.bin").write_bytes(b"x"),
    "folder missing": lambda step: shutil.rmtree(step / "data"),
    "nothing left": lambda step: shutil.rmtree(step),
    "wrong figure": lambda step: flip(step / "step.json", after=b'"weight_bytes": '),
    "wrong key": lambda step: flip(step / "step.json", after=b'"fi'),
    "no JSON": lambda step: flip(step / "step.json", after=b'"digest"'),
    "other JSON": lambda step: (step / "step.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_step_is_done_again_and_not_used(desk, finished, run, events, damage):
    victim = "2 quantize.rtn"
    damage(next(step for step, _, _ in StepCache().entries() if step.name == victim).data.parent)
    told = events()
    run(desk.recipe(), desk.folder / "out", [told])
    assert told.made == [victim]
    assert hash_files(desk.folder / "out" / "weights") == hash_files(finished.out / "weights")


def test_a_step_that_wrote_nothing_is_damaged_without_its_folder(desk, run, events):
    next(step for step, _, _ in StepCache().entries() if step.name == "compile").data.rmdir()
    told = events()
    run(desk.recipe(), desk.folder / "out", [told])
    assert told.made == ["compile"]


def test_failures_are_not_cached(desk, run, events):
    from optkit.transforms import Transform

    class Flaky(Transform):
        fails: ClassVar[int] = 1

        def provides(self):
            return frozenset({"flaky:ran"})

        def apply(self, model, context):
            if type(self).fails:
                type(self).fails -= 1
                raise ZeroDivisionError("this time")
            return model.tagged(*self.provides())

    class Hopeless(Flaky):
        fails: ClassVar[int] = 1000

    class Offers(events):
        @hookimpl
        def register_transforms(self):
            return {"flaky": Flaky, "hopeless": Hopeless}

    recipe, out = desk.recipe(transforms=["flaky", "hopeless"]), desk.folder / "out"
    for finished_steps in ([], [("1 flaky", False), ("1 flaky: quality", False)]):
        told = Offers()
        with pytest.raises(ZeroDivisionError, match="this time"):
            run(recipe, out, [told])
        assert told.finished == finished_steps
    told = Offers()
    with pytest.raises(ZeroDivisionError):
        run(recipe, out, [told])
    assert told.found == ["1 flaky", "1 flaky: quality"]
    assert told.started[-1] == "2 hopeless"
    assert Hopeless.fails == 998
    assert sorted(os.listdir(desk.folder)) == ["cache", "recipe.yaml"]
    assert not list((desk.folder / "cache" / "work").iterdir())


# --- observers


def test_an_observer_that_raises_is_named_and_stops_nobody(desk, finished, run, events, caplog):
    class Broken:
        @hookimpl
        def step_started(self):
            raise ZeroDivisionError("no step")

        @hookimpl
        def step_finished(self, step):
            if step == "compile":
                raise MachineError("cannot be written", where="log.jsonl")

    before, after = events(), events()
    with caplog.at_level(logging.WARNING):
        run(desk.recipe(), desk.folder / "out", [before, Broken(), after])
    assert before.finished == after.finished == [(step, True) for step in STEPS]
    messages = [record.getMessage() for record in caplog.records if record.name == "optkit.apply.run"]
    assert len(messages) == len(STEPS) + 1
    assert messages[0] == (
        "plugin 'observer 1' failed when it was told of 1 prune.magnitude (ZeroDivisionError: no step)"
    )
    assert (
        "plugin 'observer 1' failed when it was told of compile (MachineError: log.jsonl: cannot be written)"
        in messages
    )
    assert hash_files(desk.folder / "out" / "weights") == hash_files(finished.out / "weights")


def test_an_observer_cannot_change_what_it_is_told(desk, finished, run):
    class Forger:
        @hookimpl
        def step_finished(self, report):
            report["metrics"]["perplexity"]["value"] = 1.0
            report.clear()

    report = run(desk.recipe(), desk.folder / "out", [Forger()]).report
    assert report["metrics"] == open_artifact(finished.out).report()["metrics"]
