"""From a recipe to an artifact: what is in it, and what is done again when something changes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from typing import ClassVar

import numpy as np
import pytest

from optkit.apply.cache import StepCache
from optkit.artifact import hash_files, open_artifact
from optkit.errors import DamagedError, GateFailed, MachineError, RecipeError
from optkit.hookspecs import hookimpl
from optkit.plugins import Plugins
from optkit.recipe import load_recipe

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


def test_the_artifact_is_whole_and_nothing_else_is_left(finished):
    artifact = open_artifact(finished.out)
    assert sorted(os.listdir(finished.out)) == [
        "manifest.json", "recipe.yaml", "report.html", "report.json", "runtime", "weights"
    ]  # fmt: skip
    assert (finished.out / "recipe.yaml").read_bytes() == (finished.desk.folder / "given.yaml").read_bytes()
    assert sorted(artifact.manifest.files) == sorted(set(hash_files(finished.out)) - {"manifest.json"})
    assert not [name for name in os.listdir(finished.desk.folder) if name.startswith(".")]
    assert not list((finished.cache / "work").iterdir())


def test_the_manifest_says_how_it_was_made(finished):
    manifest = open_artifact(finished.out).manifest
    recipe = load_recipe(finished.desk.folder / "given.yaml", Plugins.load(third_party=False))
    assert manifest.name == "baseline"
    assert manifest.recipe == json.loads(json.dumps(recipe.resolved()))
    assert (manifest.max_batch_size, manifest.max_length) == (1, 256)
    assert {"arch:llama", "sparsity:unstructured", "weights:int8-channel"} < set(manifest.tags)
    assert manifest.machine["libraries"]["torch"]
    assert manifest.machine["cpu"]
    prune, quantize, compiled = manifest.steps
    assert (prune.step, quantize.step, compiled.step) == ("1 prune.magnitude", "2 quantize.rtn", "compile")
    assert {step.distribution for step in manifest.steps} == {"optkit"}
    assert prune.options == {"sparsity": 0.3, "targets": ["Linear"], "ignore": ["lm_head"]}
    assert quantize.options["granularity"] == "channel"
    assert len({step.key for step in manifest.steps}) == 3
    for step in (prune, quantize):
        assert step.seconds > 0
        assert step.effect["metrics"]["kl"]["value"] > 0
        assert (
            step.effect["metrics"]["perplexity"]["ratio"]["low"] < step.effect["metrics"]["perplexity"]["ratio"]["high"]
        )
    weights = sum(record.bytes for name, record in manifest.files.items() if name.startswith("weights/"))
    assert quantize.effect["weight_bytes"] == weights < prune.effect["weight_bytes"]


def test_the_report_has_every_installed_metric(finished):
    report = open_artifact(finished.out).report()
    assert report["metrics"].keys() == set(Plugins.load(third_party=False).names("metric"))
    for figure in report["metrics"].values():
        assert not figure.get("withheld")
        assert np.isfinite([figure["baseline"], figure["value"]]).all()
    assert report["metrics"]["perplexity"]["verdict"]
    assert report["metrics"]["size_bytes"]["verdict"] == "better"
    assert report["parity"]["distance"] <= report["parity"]["tolerance"] == 1e-5
    assert [gate["gate"] for gate in report["gates"]] == ["parity"]
    head, *runs = map(json.loads, report["samples"])
    assert head["arms"] == ["baseline", "optimized", "optimized (again)"]
    assert len(runs) == 3 * 2 * 3
    page = (finished.out / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{name}</td>" in page for name in report["metrics"])


def test_the_weights_load_in_plain_transformers_with_the_logits_of_the_session(finished):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optkit.evaluate import SessionScorer
    from optkit.steps import Limits
    from optkit_backends.torch import Torch

    artifact = open_artifact(finished.out)
    tokenizer = AutoTokenizer.from_pretrained(artifact.weights)
    window = tuple(tokenizer(finished.desk.text.read_text(), add_special_tokens=False)["input_ids"][:100])
    module = AutoModelForCausalLM.from_pretrained(artifact.weights, dtype=torch.float32)
    with torch.inference_mode():
        expected = module(input_ids=torch.tensor([window])).logits[0].double().numpy()
    with Torch().open(artifact.runtime, artifact.weights, Limits(1, 128)) as session:
        found = SessionScorer(session).logits(window)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    projection = dict(module.named_modules())["model.layers.0.mlp.up_proj"].weight
    assert (projection == 0).float().mean() >= 0.3  # pruned before it was quantized, and still


def test_a_second_apply_does_nothing(desk, finished, run, events):
    before = hash_files(finished.out), finished.out.stat().st_ino
    told = events()
    outcome = run(finished.desk.folder / "given.yaml", finished.out, [told])
    assert outcome.existed
    assert outcome.steps == ()
    assert outcome.report == open_artifact(finished.out).report()
    assert not told.started
    assert (hash_files(finished.out), finished.out.stat().st_ino) == before


def test_another_output_takes_everything_from_the_cache(desk, finished, run, events):
    told = events()
    outcome = run(finished.desk.folder / "given.yaml", desk.folder / "deep" / "other", [told])
    assert told.finished == [(step, True) for step in STEPS]
    assert [step.name for step in outcome.steps] == STEPS
    assert not outcome.existed
    for part in ("weights", "runtime"):
        assert hash_files(desk.folder / "deep" / "other" / part) == hash_files(finished.out / part)
    before = open_artifact(finished.out).report()
    assert {**outcome.report, "machine": None, "name": None} == {**before, "machine": None, "name": None}
    umask = os.umask(0)
    os.umask(umask)
    files = [file for file in (desk.folder / "deep" / "other").rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_links_and_other_spellings_are_one_output(desk, run, events):
    (desk.folder / "real").mkdir()
    (desk.folder / "link").symlink_to("real")
    recipe = desk.recipe()
    run(recipe, desk.folder / "link" / ".." / "link")
    assert (desk.folder / "link").is_symlink()
    assert open_artifact(desk.folder / "real").manifest.name == "tiny"
    assert run(recipe, desk.folder / "real").existed
    assert sorted(os.listdir(desk.folder)) == ["cache", "link", "real", "recipe.yaml"]


# --- what is done again


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


# --- what stands at the output already


def test_what_is_no_artifact_of_this_recipe_is_not_touched(desk, finished, run):
    out = desk.folder / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RecipeError, match="no artifact; choose another --output"):
            run(desk.recipe(), out, overwrite=overwrite)
    assert os.listdir(out) == ["thesis.tex"]
    shutil.rmtree(out)
    shutil.copytree(finished.out, out)
    with pytest.raises(RecipeError, match=r"holds the artifact of another recipe; .* or add --overwrite"):
        run(desk.recipe(name="new"), out)
    assert hash_files(out) == hash_files(finished.out)
    assert not run(desk.recipe(name="new"), out, overwrite=True).existed
    assert open_artifact(out).manifest.name == "new"


def test_a_damaged_artifact_is_made_anew_when_asked(desk, run):
    out = desk.folder / "out"
    run(desk.recipe(), out)
    good = hash_files(out / "weights")
    (out / "weights" / "config.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"weights/config\.json: changed since it was written; add --overwrite"):
        run(desk.recipe(), out)
    run(desk.recipe(), out, overwrite=True)
    assert hash_files(out / "weights") == good


CROOKED = """
from optkit.hookspecs import hookimpl
from optkit.metrics import RunMetric
from optkit.steps import StepResult
from optkit_backends.torch import Torch
from optkit_backends.torch.session import TorchSession

class Session(TorchSession):
    def execute(self, plan):
        return StepResult(tuple(logits * 1.001 for logits in super().execute(plan).logits))

class Crooked(Torch):
    def open(self, runtime, weights, limits):
        return Session(weights, limits)

class HundredthToken(RunMetric):
    unit, better = "s", "lower"

    def of(self, run):
        return run.token_seconds[99] if len(run.token_seconds) > 99 else 0.0

@hookimpl
def register_backends():
    return {"crooked": Crooked}

@hookimpl
def register_metrics():
    return {"hundredth_token": HundredthToken}
"""


def test_wrong_logits_and_withheld_figures_are_rejected(desk, install, events):
    """A backend that computes something else, and a gate on a figure that runs of 8 tokens do not have.

    Also the way without any transform: the weights are the model's own.
    """
    from safetensors.numpy import load_file

    from optkit.apply import apply, make_plan

    install("optkit_crooked", CROOKED)
    plugins, out, told = Plugins.load(only=["optkit_crooked"]), desk.folder / "out", events()
    plugins.register(told, "events")
    gates = [{"metric": "hundredth_token", "at_most": "2x"}, {"metric": "kl", "at_most": 1}]
    plan = make_plan(load_recipe(desk.recipe(transforms=[], backend="crooked", gates=gates), plugins), plugins)
    with pytest.raises(GateFailed) as failed:
        apply(plan, plugins, out, progress=lambda *_: None)
    parity, withheld, aside = str(failed.value).removeprefix(f"{out}: ").split("; ")
    assert parity.startswith(
        "parity: logits are 0.001 away from the transformed model's, 1e-05 is allowed (weights:float "
    )
    reason = "the figure is withheld (runs of this length have no such figure)"
    assert withheld == f"gate hundredth_token at_most 2x: {reason}"
    assert aside == f"the artifact was kept aside at {out}.rejected"
    assert told.made == ["save weights", "compile", "quality", "benchmark"]
    assert not out.exists()
    rejected = open_artifact(desk.folder / "out.rejected")
    assert [gate["passed"] for gate in rejected.report()["gates"]] == [False, False, True]
    kept, given = load_file(rejected.weights / "model.safetensors"), load_file(desk.model / "model.safetensors")
    assert kept.keys() == given.keys()
    assert all(np.array_equal(kept[name], given[name]) for name in kept)
