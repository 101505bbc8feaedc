"""From a recipe to an artifact: what is in it, and what may stand in its place."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from optkit.artifact import hash_files, open_artifact
from optkit.errors import DamagedError, GateFailed, RecipeError
from optkit.metrics import FootprintMetric, RunMetric, TokenMetric
from optkit.plugins import Plugins
from optkit.recipe import load_recipe


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
    assert prune.options == {"sparsity": 0.3, "pattern": None, "targets": ["Linear"], "ignore": ["lm_head"]}
    assert quantize.options["granularity"] == "channel"
    assert len({step.key for step in manifest.steps}) == 3
    for step in (prune, quantize):
        assert step.seconds > 0
        assert step.effect["metrics"]["kl"]["value"] > 0
        assert 0 < step.effect["compressed_bytes"] < step.effect["weight_bytes"]
        assert (
            step.effect["metrics"]["perplexity"]["ratio"]["low"] < step.effect["metrics"]["perplexity"]["ratio"]["high"]
        )
    weights = sum(record.bytes for name, record in manifest.files.items() if name.startswith("weights/"))
    assert quantize.effect["weight_bytes"] == weights < prune.effect["weight_bytes"]


def test_the_report_has_every_installed_metric_of_its_task(finished):
    report = open_artifact(finished.out).report()
    plugins = Plugins.load(third_party=False)
    shapes = (TokenMetric, RunMetric, FootprintMetric)
    installed = {name for name in plugins.names("metric") if issubclass(plugins.get("metric", name), shapes)}
    assert report["metrics"].keys() == installed > {"perplexity", "ttft_ms", "size_bytes"}
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
    assert told.finished == [(step, True) for step in finished.events.started]
    assert [step.name for step in outcome.steps] == finished.events.started
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
