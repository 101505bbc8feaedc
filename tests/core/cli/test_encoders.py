"""Every command on a real artifact of a tiny encoder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

RECIPE = """\
name: {name}
model:
  hf: {{model: encoder}}
transforms:
  - quantize.rtn: {{bits: {bits}}}
batching:
  bucketed: {{max_batch_size: 8}}
evaluation: {{dataset: {{text_file: {{path: text.txt}}}}, tokens: 256}}
benchmark: {{blocks: 3}}
gates:
  - {{metric: embedding_cosine, at_least: {at_least}}}
"""
QUALITY = {"embedding_cosine", "embedding_cosine_p01"}
SPEED = {"sequences_per_second", "size_bytes", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def made(furnished, tiny_encoder):
    """The folder with `made/eight`, and what `apply` answered when it made it."""
    from optkit.cli import main

    shutil.copytree(tiny_encoder, furnished / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(furnished)
        patch.setenv("OPTKIT_CACHE", str(furnished / "cache"))
        Path("eight.yaml").write_text(RECIPE.format(name="eight", bits=8, at_least=0.9))
        patch.setattr(sys, "argv", ["optkit", "apply", "eight.yaml", "--output", "made/eight", "--json"])
        with Path("eight.out").open("w") as out, patch.context() as inner:
            inner.setattr(sys, "stdout", out)
            with pytest.raises(SystemExit) as end:
                main()
        assert end.value.code == 0
    return furnished, json.loads((furnished / "eight.out").read_text())


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made[0])
    monkeypatch.setenv("OPTKIT_CACHE", str(made[0] / "cache"))
    return made[0]


def test_apply_measures_embeddings_and_sequences(made):
    from optkit.artifact import open_artifact

    folder, answer = made
    report = answer["report"]
    assert report["metrics"].keys() == QUALITY | SPEED
    assert 0.9 < report["metrics"]["embedding_cosine"]["value"] < 1
    assert report["metrics"]["sequences_per_second"]["ratio"]["value"] > 0
    assert report["parity"]["distance"] <= report["parity"]["tolerance"]
    assert [gate["gate"] for gate in report["gates"]] == ["parity", "embedding_cosine at_least 0.9"]
    head, *runs = map(json.loads, report["samples"])
    assert head["arms"] == ["baseline", "optimized", "optimized (again)"]
    assert len(runs) == 3 * 2 * 3
    assert {run["run"]["sequences"] for run in runs} == {head["workload"]["sequences"]}
    manifest = open_artifact(folder / "made/eight").manifest
    assert {"task:feature-extraction", "arch:bert", "weights:int8-channel"} < set(manifest.tags)
    effect = manifest.steps[0].effect
    assert effect["metrics"].keys() == QUALITY
    assert effect["metrics"]["embedding_cosine"]["value"] == pytest.approx(
        report["metrics"]["embedding_cosine"]["value"], abs=1e-4
    )


def test_the_artifact_encodes_as_it_was_measured(here):
    import optkit
    from optkit.weights import load_folder

    texts = Path("text.txt").read_text().split("\n\n")[:30]
    with optkit.Encoder("made/eight") as encoder:
        found = encoder.encode(texts)
    model = load_folder(Path("made/eight/weights"))
    import torch

    with torch.inference_mode():
        for text, row in zip(texts, found, strict=True):
            ids = model.tokenizer(text.strip(), truncation=True, max_length=64)["input_ids"]
            mean = model.module(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_plan_and_inspect_say_what_it_is(here, optkit):
    plan, inspected = optkit("plan", "eight.yaml"), optkit("inspect", "made/eight")
    assert (plan.code, inspected.code) == (0, 0)
    assert "batching bucketed: 8 sequences of up to 64 tokens" in plan.out
    assert "gate     embedding_cosine at_least 0.9" in plan.out
    assert "weights for  optkit, transformers, sentence-transformers" in inspected.out
    assert "sequences_per_second" in inspected.out


def test_apply_again_says_how_to_use_it(here, optkit):
    said = optkit("apply", "eight.yaml", "--output", "made/eight")
    assert said.out.endswith('Next, in Python: optkit.Encoder("made/eight").encode(["Why is the sky blue?"])\n')


def test_explain_says_which_kernel_ran_each_layer_of_a_batch(here, optkit):
    found = json.loads(optkit("explain", "made/eight", "--json", "--prompt-tokens", "16", "--batch-size", "3").out)
    assert found["what"] == "encoding of 16 tokens, 3 sequences at once"
    rows = {row["layers"]: row for row in found["rows"]}
    up = rows["encoder.layer.*.intermediate.dense"]
    [call, *others] = [kernel for kernel in found["kernels"] if kernel["layer"].endswith("intermediate.dense")]
    config = json.loads(Path("encoder/config.json").read_text())
    assert call["operations"] == 2 * 3 * 16 * config["hidden_size"] * config["intermediate_size"]
    assert up["gflop_per_second"] * up["seconds"] * 1e9 == pytest.approx(call["operations"] * (1 + len(others)))
    assert not call["integer"]
    read = up["gb_per_second"] / found["ceiling_gb_per_s"]
    assert up["of_ceiling"] == pytest.approx(max(read, up["gflop_per_second"] / found["ceiling_gflop_per_s"]))
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    said = optkit("explain", "made/eight", "--prompt-tokens", "16")
    assert "encoding of 16 tokens under the profiler" in said.out


def test_bench_eval_and_compare_measure_it_again(here, optkit):
    shutil.copytree("made/eight", "made/copy", dirs_exist_ok=True)
    bench = json.loads(optkit("bench", "made/eight", "--blocks", "3", "--json").out)
    assert bench["reference"] == "baseline"
    assert bench["figures"]["made/eight"].keys() == SPEED
    evaluated = json.loads(optkit("eval", "made/eight", "--json").out)["figures"]["made/eight"]
    assert evaluated.keys() == QUALITY
    report = json.loads(Path("made/eight/report.json").read_text())
    for name in QUALITY:
        assert evaluated[name]["value"] == pytest.approx(report["metrics"][name]["value"], abs=1e-6)
    compared = json.loads(optkit("compare", "made/eight", "made/copy", "--blocks", "3", "--json").out)
    assert compared["figures"]["made/copy"].keys() == QUALITY | SPEED
    assert compared["figures"]["made/copy"]["embedding_cosine"]["value"] == 1


def published(folder, tags):
    from optkit.artifact import publish, staging

    facts = {"name": "other", "recipe": {}, "recipe_hash": "", "tags": tags, "max_batch_size": 1, "max_length": 8}
    facts |= {"steps": [], "servable_by": [], "machine": {}}
    with staging(folder) as staged:
        (staged / "weights").mkdir()
        (staged / "weights/model.safetensors").write_bytes(bytes(64))
        publish(staged, folder, facts)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("generate made/eight Hello", "made/eight: is no causal language model; optkit.Encoder runs an encoder"),
        (
            "explain made/eight --batch-size 99",
            "made/eight: holds fewer at once, found 99; give --batch-size 8 or less",
        ),
        (
            "bench made/eight --prompt-tokens 8",
            "made/eight: --prompt-tokens and --output-tokens mean nothing for its task (encoder); leave them out",
        ),
        (
            "compare made/eight made/words",
            "made/words: is of another task (causal language model) than made/eight (encoder); compare one task only",
        ),
    ],
)
def test_what_an_encoder_cannot_do_is_one_line(here, optkit, monkeypatch, command, line):
    from optkit import hardware
    from optkit.hardware import ceilings

    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    monkeypatch.setattr(ceilings, "SIZES", (128,))
    hardware.measure(lambda *_: None)
    if not (here / "made/words").exists():
        published(here / "made/words", ["task:causal-lm"])
    said = optkit(*command.split())
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[-1] == f"optkit: {line}"
