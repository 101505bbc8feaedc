"""Every mistake is one line that says where, what, what was found and what to do; and nothing is written.

`errors/CASE.txt` holds the command, its line on standard error and its exit code, verbatim; `errors/CASE.yaml` the
wrong recipe. `OPTKIT_UPDATE_GOLDEN=1 pytest tests/core/cli/test_errors.py` writes the `.txt` files anew: read what
changed.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from PIL import Image

GOLDEN = Path(__file__).with_name("errors")
UPDATE = os.environ.get("OPTKIT_UPDATE_GOLDEN") == "1"

RECIPE = "model:\n  hf: {model: model}\n"

# What git cannot keep, or nobody could read.
BYTES = {
    "utf-16": RECIPE.encode("utf-16"),
    "not-utf-8": RECIPE.encode() + "name: Größe\n".encode("latin-1"),
    "byte-order-mark": b"\xef\xbb\xbf" + RECIPE.encode(),
    "nul": RECIPE.encode() + b"name: a\0b\n",
    "too-large": b"# " + b"x" * (1 << 20) + b"\n" + RECIPE.encode(),
}

CLIP = """
    from optkit.hookspecs import hookimpl

    @hookimpl
    def register_transforms():
        return {{"clip": "{target}"}}
"""
NO_GPU = """
    from optkit.hookspecs import hookimpl
    from optkit_backends.torch import Torch

    class CudaGraphs(Torch):
        def unavailable(self):
            return "needs an NVIDIA GPU; this machine has none"

    @hookimpl
    def register_backends():
        return {"cuda_graphs": CudaGraphs}
"""


def truncated_gguf(desk):
    metadata = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
    (desk / "short.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 12, 40) + metadata)


def gguf_without_its_end(desk):
    """A whole header that says where one tensor of 4096 floats lies, and half of them."""
    name = struct.pack("<Q", 10) + b"token_embd"
    tensor = name + struct.pack("<IQQIQ", 2, 64, 64, 0, 0)
    (desk / "short.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + tensor + bytes(8192))


def packed(desk):
    weights = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    stored = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
    changed_config(desk, "packed", quantization_config=stored)


def changed_config(desk, folder, **changes):
    shutil.copytree(desk / "model", desk / folder)
    file = desk / folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def encoder(desk, tiny_encoder):
    shutil.copytree(tiny_encoder, desk / "encoder")


def classifier(desk, tiny_classifier):
    """With images whose classes are 5 and 6."""
    shutil.copytree(tiny_classifier, desk / "classifier")
    for label in "56":
        (desk / "images" / label).mkdir(parents=True)
        Image.new("L", (9, 5)).save(desk / "images" / label / "a.png")


def unreadable_image(desk, tiny_classifier):
    classifier(desk, tiny_classifier)
    (desk / "images/6/b.png").write_bytes(b"no image at all")


def image_of_another_class(desk, tiny_classifier):
    classifier(desk, tiny_classifier)
    (desk / "images/6").rename(desk / "images/eleven")


def no_images(desk, tiny_classifier):
    classifier(desk, tiny_classifier)
    shutil.rmtree(desk / "images")
    (desk / "images/6").mkdir(parents=True)


def without_processor(desk, tiny_classifier):
    classifier(desk, tiny_classifier)
    (desk / "classifier/preprocessor_config.json").unlink()


def weighted_mean(desk, tiny_encoder):
    encoder(desk, tiny_encoder)
    (desk / "encoder/1_Pooling/config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')


def without(desk, folder, pattern):
    shutil.copytree(desk / "model", desk / folder)
    for file in (desk / folder).glob(pattern):
        file.unlink()


def damaged_weights(desk):
    shutil.copytree(desk / "model", desk / "damaged")
    (desk / "damaged/model.safetensors").write_bytes(b"\xff" * 64)


def other_artifact(desk):
    """The smallest artifact that there can be."""
    from optkit.artifact import publish, staging

    facts = {"name": "other", "recipe": {}, "recipe_hash": "0" * 64, "tags": [], "max_batch_size": 1, "max_length": 8}
    facts |= {"steps": [], "servable_by": [], "machine": {}}
    with staging(desk / "taken") as staged:
        (staged / "weights").mkdir()
        (staged / "weights/model.safetensors").write_bytes(bytes(64))
        publish(staged, desk / "taken", facts)


def damaged_artifact(desk):
    other_artifact(desk)
    (desk / "taken/weights/model.safetensors").write_bytes(bytes(63) + b"\1")


def damaged_manifest(desk):
    other_artifact(desk)
    file = desk / "taken/manifest.json"
    file.write_text(file.read_text().replace('"max_length": 8', '"max_length": 9'))


def folder_of_files(desk):
    (desk / "taken").mkdir()
    (desk / "taken/thesis.tex").write_text("years of work")


def requests(*custom_ids):
    def write(desk):
        other_artifact(desk)
        line = '{{"custom_id": "{}", "method": "POST", "url": "/v1/completions", "body": {{"prompt": "a"}}}}'
        (desk / "in.jsonl").write_text("\n".join(map(line.format, custom_ids)))
        (desk / "taken.jsonl").write_text("years of work\n")

    return write


def half_a_request(desk):
    requests("a")(desk)
    with (desk / "in.jsonl").open("a") as stream:
        stream.write('\n{"custom_id": "b", "me')


def short_key(desk):
    other_artifact(desk)
    (desk / "keys.txt").write_text("alice: tooshort\n")
    (desk / "keys.txt").chmod(0o600)


def open_keys(desk):
    other_artifact(desk)
    (desk / "keys.txt").write_text("alice: 0123456789abcdef\n")
    (desk / "keys.txt").chmod(0o644)


def little_memory(desk, monkeypatch):
    from optkit import hardware

    monkeypatch.setattr(hardware, "memory", lambda: hardware.Memory(total=1 << 20, available=1 << 20))


def little_disk(desk, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 20, 1 << 20, 0))


def broken_cache(desk, monkeypatch):
    monkeypatch.setenv("OPTKIT_CACHE", "text.txt/cache")


def no_onnxruntime(desk, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


# What must be there, or must not, besides the recipe. By the names of its arguments it gets fixtures.
PREPARE = {
    "missing-recipe": lambda desk: (desk / "quickstart.yaml").write_text(RECIPE),
    "recipe-is-a-directory": lambda desk: None,
    "model-without-safetensors": lambda desk: without(desk, "bare", "*.safetensors"),
    "model-without-config": lambda desk: without(desk, "bare", "config.json"),
    "model-with-damaged-weights": damaged_weights,
    "not-a-language-model": lambda desk: changed_config(desk, "encoder", architectures=["BertForMaskedLM"]),
    "gate-of-another-task": encoder,
    "prompt-for-an-encoder": encoder,
    "pooling-that-optkit-does-not-have": weighted_mean,
    "classifier-without-image-processor": without_processor,
    "image-of-another-class": image_of_another_class,
    "image-unreadable": unreadable_image,
    "images-for-a-language-model": classifier,
    "no-images": no_images,
    "text-for-an-image-classifier": classifier,
    "gguf-truncated": truncated_gguf,
    "gguf-cut-short": gguf_without_its_end,
    "model-quantized-already": packed,
    "text-not-utf-8": lambda desk: (desk / "latin.txt").write_bytes("Größe".encode("latin-1")),
    "missing-extra": no_onnxruntime,
    "no-gpu": lambda site: site("optkit_cuda", NO_GPU),
    "two-plugins-of-one-name": lambda site: (
        site("optkit_clip", CLIP.format(target="optkit_prune.magnitude:Magnitude")),
        site("optkit_snip", CLIP.format(target="optkit_prune.magnitude:Magnitude")),
    ),
    "plugin-fails-to-import": lambda site: site("optkit_clip", CLIP.format(target="optkit_clip.missing:Clip")),
    "plugin-not-loaded": lambda site: site("optkit_clip", "import a_library_that_is_not_there"),
    "not-enough-memory": little_memory,
    "not-enough-disk": little_disk,
    "cache-cannot-be-written": broken_cache,
    "output-of-another-recipe": other_artifact,
    "output-is-no-artifact": folder_of_files,
    "artifact-damaged": damaged_artifact,
    "manifest-damaged": damaged_manifest,
    "no-artifact-but-files": folder_of_files,
    "batch-of-nowhere": other_artifact,
    "batch-line-is-no-json": half_a_request,
    "batch-custom-id-twice": requests("a", "b", "a"),
    "batch-output-is-taken": requests("a"),
    "serve-everybody": other_artifact,
    "serve-keys-of-nowhere": other_artifact,
    "serve-name-twice": other_artifact,
    "serve-odd-name": other_artifact,
    "serve-replicas-without-ray": other_artifact,
    "serve-unknown-setting": other_artifact,
    "serve-wrong-setting": other_artifact,
    "serve-keys-for-all-to-read": open_keys,
    "serve-short-key": short_key,
}

# `apply CASE.yaml` unless it is here.
COMMANDS = {
    "missing-recipe": "apply quikstart.yaml",
    "recipe-is-a-directory": "apply model",
    "output-of-another-recipe": "apply output-of-another-recipe.yaml --output taken",
    "output-is-no-artifact": "apply output-is-no-artifact.yaml --output taken --overwrite",
    "output-cannot-be-written": "apply output-cannot-be-written.yaml --output text.txt/artifact",
    "plugin-left-out": "--block quantize apply plugin-left-out.yaml",
    "artifact-damaged": "inspect taken",
    "manifest-damaged": "inspect taken",
    "no-artifact": "inspect nowhere",
    "no-artifact-but-files": "generate taken Hello",
    "compare-one": "compare nowhere",
    "unknown-command": "aply recipe.yaml",
    "unknown-option": "apply recipe.yaml --ouput there",
    "missing-argument": "apply",
    "missing-value": "apply recipe.yaml --output",
    "surplus-argument": "plan one.yaml two.yaml",
    "option-out-of-range": "bench nowhere --blocks 1",
    "option-of-wrong-type": "generate nowhere Hello --seed twelve",
    "block-of-nothing": "--block quantise plugins list",
    "unknown-plugin-to-show": "plugins show quantise.rtn",
    "batch-of-nowhere": "batch taken nowhere.jsonl out.jsonl",
    "batch-line-is-no-json": "batch taken in.jsonl out.jsonl",
    "batch-custom-id-twice": "batch taken in.jsonl out.jsonl",
    "batch-output-is-taken": "batch taken in.jsonl taken.jsonl",
    "serve-everybody": "serve taken --host 0.0.0.0",
    "serve-keys-for-all-to-read": "serve taken --keys keys.txt",
    "serve-keys-of-nowhere": "serve taken --keys nowhere.txt",
    "serve-name-twice": "serve a=taken a=taken",
    "serve-odd-name": "serve a/b=taken",
    "serve-of-nowhere": "serve nowhere",
    "serve-replicas-without-ray": "serve taken --replicas 2",
    "serve-short-key": "serve taken --keys keys.txt",
    "serve-unknown-setting": "serve taken --set max_que=3",
    "serve-wrong-setting": "serve taken --set max_queue=many",
    "schema-cannot-be-written": "schema --output text.txt/schema.json",
}

# These are found out only when the work has begun: they say so below their progress, and finished steps stay.
LATE = {"image-unreadable", "too-little-text-in-tokens"}
# Standard error also names the plugin that did not load.
NAMED_FIRST = {"plugin-not-loaded"}

CASES = sorted({file.stem for file in GOLDEN.glob("*.yaml")} | BYTES.keys() | COMMANDS.keys())


def listing(folder: Path) -> dict[str, bytes | None]:
    # Locks are taken before anything is checked that another process may change; they are empty.
    files = [path for path in folder.rglob("*") if "locks" not in path.relative_to(folder).parts]
    return {str(path): path.read_bytes() if path.is_file() else None for path in files if path.name != "cache"}


@pytest.mark.parametrize("case", CASES)
def test_the_line_is_the_one_on_record(case, desk, optkit, request):
    if case in BYTES:
        (desk / f"{case}.yaml").write_bytes(BYTES[case])
    elif (GOLDEN / f"{case}.yaml").exists():
        shutil.copy(GOLDEN / f"{case}.yaml", desk)
    prepare = PREPARE.get(case, lambda: None)
    wanted = prepare.__code__.co_varnames[: prepare.__code__.co_argcount]
    prepare(**{name: request.getfixturevalue(name) for name in wanted})
    before = listing(desk)

    command = COMMANDS.get(case, f"apply {case}.yaml")
    said = optkit(*command.split())

    assert said.out == ""
    lines = said.err.splitlines()
    assert all(line.startswith("optkit: ") for line in lines if case not in LATE)
    assert "Traceback" not in said.err
    assert len(lines) == (2 if case in NAMED_FIRST else 1) or case in LATE
    line = lines[-1].replace(f"{desk}/", "")
    assert line.startswith("optkit: ")
    assert str(desk.parent) not in line
    if case not in LATE:
        assert listing(desk) == before
    assert not (desk / "artifacts").exists() or not list((desk / "artifacts").iterdir())

    golden = GOLDEN / f"{case}.txt"
    found = f"$ optkit {command}\n{line}\nexit code {said.code}\n"
    if UPDATE:
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8")


def test_nothing_is_on_record_that_is_not_tested():
    assert sorted(file.stem for file in GOLDEN.glob("*.txt")) == CASES
    assert {file.suffix for file in GOLDEN.iterdir()} == {".yaml", ".txt"}
