"""Every command on a real artifact of a small image classifier whose convolutions are int8."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.picturing import NAMES, digits

# A command that measures memory starts two processes with all of torch: one apply by default, the rest is slow.
pytestmark = pytest.mark.timeout(600)

RECIPE = """\
name: {name}
model:
  hf: {{model: {model}}}
transforms:
  - quantize.int8_static: {{targets: [Conv2d, Linear], observer: minmax}}
batching:
  dynamic: {{max_batch_size: 8}}
calibration: {{dataset: {{imagefolder: {{path: images}}}}, samples: 24}}
evaluation: {{dataset: {{imagefolder: {{path: images}}}}, images: 40}}
benchmark: {{blocks: 3}}
gates:
  - {{metric: label_agreement, at_least: 0.5}}
"""
QUALITY = {"label_agreement", "accuracy"}
SPEED = {"images_per_second", "size_bytes", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_classifier):
    """A folder with `made/int8`, and what `apply` answered when it made it."""
    from optkit.cli import main

    folder = tmp_path_factory.mktemp("pictures")
    images, labels = digits()
    for number in range(80):
        place = folder / "images" / NAMES[labels[number]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(place / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OPTKIT_CACHE", str(folder / "cache"))
        Path("int8.yaml").write_text(RECIPE.format(name="int8", model=tiny_classifier))
        patch.setattr(sys, "argv", ["optkit", "apply", "int8.yaml", "--output", "made/int8", "--json"])
        with Path("int8.out").open("w") as out, patch.context() as inner:
            inner.setattr(sys, "stdout", out)
            with pytest.raises(SystemExit) as end:
                main()
        assert end.value.code == 0
    return folder, json.loads((folder / "int8.out").read_text())


@pytest.fixture
def here(made, monkeypatch):
    monkeypatch.chdir(made[0])
    monkeypatch.setenv("OPTKIT_CACHE", str(made[0] / "cache"))
    return made[0]


def test_apply_measures_classes_and_images(made):
    from optkit.artifact import open_artifact

    folder, answer = made
    report = answer["report"]
    assert report["metrics"].keys() == QUALITY | SPEED
    assert 0.5 < report["metrics"]["label_agreement"]["value"] <= 1
    assert report["metrics"]["images_per_second"]["unit"] == "img/s"
    assert report["parity"]["distance"] <= report["parity"]["tolerance"]
    head, *runs = map(json.loads, report["samples"])
    assert head["arms"] == ["baseline", "optimized", "optimized (again)"]
    assert {run["run"]["images"] for run in runs} == {head["workload"]["images"]} == {40}
    manifest = open_artifact(folder / "made/int8").manifest
    assert {"task:image-classification", "arch:resnet", "weights:int8-channel"} < set(manifest.tags)
    assert manifest.servable_by == ["optkit"]
    assert manifest.steps[0].effect["metrics"].keys() == QUALITY


@pytest.mark.slow
def test_plan_inspect_and_apply_again_say_what_it_is(here, optkit):
    plan, inspected = optkit("plan", "int8.yaml"), optkit("inspect", "made/int8")
    again = optkit("apply", "int8.yaml", "--output", "made/int8")
    assert (plan.code, inspected.code, again.code) == (0, 0, 0)
    assert "batching dynamic: 8 images\n" in plan.out
    assert "data     imagefolder: 24 images to calibrate on\n" in plan.out
    assert "limits       8 images\n" in inspected.out
    assert "images_per_second" in inspected.out
    assert again.out.endswith("Next: optkit explain made/int8   or: optkit serve made/int8\n")


@pytest.mark.slow
def test_explain_says_which_kernel_ran_each_layer_of_a_batch(here, optkit, monkeypatch):
    from optkit import hardware
    from optkit.hardware import ceilings

    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    monkeypatch.setattr(ceilings, "SIZES", (128,))
    hardware.measure(lambda *_: None)
    found = json.loads(optkit("explain", "made/int8", "--json", "--batch-size", "3").out)
    assert found["what"] == "one call on pixel_values of 1 x 24 x 24, 3 rows at once"
    [first] = [kernel for kernel in found["kernels"] if kernel["layer"] == "resnet.embedder.embedder.convolution"]
    assert first["kernel"] == "RoundedConv2d"
    assert first["operations"] == 2 * 3 * 16 * 12 * 12 * 7 * 7
    said = optkit("explain", "made/int8", "--prompt-tokens", "8")
    assert said.err.endswith("made/int8: --prompt-tokens means nothing for it; leave it out\n")


@pytest.mark.slow
def test_bench_eval_and_compare_measure_it_again(here, optkit):
    bench = json.loads(optkit("bench", "made/int8", "--blocks", "3", "--json").out)
    assert bench["figures"]["made/int8"].keys() == SPEED
    evaluated = json.loads(optkit("eval", "made/int8", "--json").out)["figures"]["made/int8"]
    assert evaluated.keys() == QUALITY
    report = json.loads(Path("made/int8/report.json").read_text())
    for name in QUALITY:
        assert evaluated[name]["value"] == pytest.approx(report["metrics"][name]["value"], abs=1e-6)
    shutil.copytree("made/int8", "made/copy", dirs_exist_ok=True)
    compared = json.loads(optkit("compare", "made/int8", "made/copy", "--blocks", "3", "--json").out)
    [figures] = compared["figures"].values()
    assert figures.keys() == QUALITY | SPEED
    assert figures["label_agreement"]["value"] == 1


@pytest.mark.slow
def test_the_artifact_classifies_as_its_weights_do(here):
    import torch

    import optkit
    from optkit.weights import ImagePreparation, load_folder

    prepare = ImagePreparation.of_folder(Path("made/int8/weights"))
    images, _ = digits()
    pixels = np.stack([prepare(np.stack([image] * 3, -1)) for image in images[:5]])

    async def ask():
        async with optkit.WorkerTensors("made/int8") as classifier:
            assert not classifier.encoder
            return await classifier.infer({"pixel_values": pixels})

    found = asyncio.run(ask())
    with torch.inference_mode():
        wanted = load_folder(Path("made/int8/weights")).module(pixel_values=torch.from_numpy(pixels)).logits
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("generate made/int8 Hello", "made/int8: is no causal language model; optkit.WorkerTensors runs it"),
        (
            "explain made/int8 --batch-size 99",
            "made/int8: holds fewer at once, found 99; give --batch-size 8 or less",
        ),
        (
            "bench made/int8 --prompt-tokens 8",
            (
                "made/int8: --prompt-tokens and --output-tokens mean nothing for its task (image classifier); "
                "leave them out"
            ),
        ),
    ],
)
def test_what_a_classifier_cannot_do_is_one_line(here, optkit, command, line):
    said = optkit(*command.split())
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[-1] == f"optkit: {line}"
