"""Artifacts: whole or absent, and every bit accounted for."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest

from optkit.artifact import open_artifact, publish, staging
from optkit.errors import DamagedError, MachineError, MissingError

FACTS = {
    "name": "small",
    "recipe": {"name": "small"},
    "recipe_hash": "0" * 64,
    "tags": ["task:causal-lm"],
    "max_batch_size": 1,
    "max_length": 16,
    "steps": [],
    "servable_by": ["optkit"],
    "machine": {},
}


def write(target, text="first"):
    with staging(target) as staged:
        (staged / "weights").mkdir()
        (staged / "runtime").mkdir()
        (staged / "weights" / "model.safetensors").write_bytes(bytes(range(256)) * 4)
        (staged / "runtime" / "empty").write_bytes(b"")
        (staged / "recipe.yaml").write_text(text)
        (staged / "report.json").write_text('{"metrics": {}}')
        return publish(staged, target, FACTS)


def test_what_is_written_opens(tmp_path):
    written = write(tmp_path / "deep" / "out")
    opened = open_artifact(tmp_path / "deep" / "out")
    assert opened == written
    assert opened.report() == {"metrics": {}}
    assert sorted(os.listdir(tmp_path / "deep")) == ["out"]


def test_one_flipped_bit_in_any_file_is_refused(tmp_path):
    whole = tmp_path / "out"
    write(whole)
    chance = random.Random(0)
    for file in sorted(file for file in whole.rglob("*") if file.is_file() and file.stat().st_size):
        content = file.read_bytes()
        bits = range(8 * len(content))
        for bit in bits if file.name == "recipe.yaml" else chance.sample(bits, min(len(bits), 400)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.raises(DamagedError, match=str(file)):
                open_artifact(whole)
        file.write_bytes(content)
    open_artifact(whole)


def test_missing_added_truncated_and_linked_files_are_refused(tmp_path):
    def changed(change, words):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        change(copy)
        with pytest.raises(DamagedError, match=words):
            open_artifact(copy, verify=False)

    whole = tmp_path / "out"
    write(whole)
    changed(lambda copy: (copy / "weights/model.safetensors").unlink(), "missing from the artifact")
    changed(lambda copy: (copy / "weights/pytorch_model.bin").write_bytes(b"x"), "not in the manifest")
    changed(lambda copy: os.truncate(copy / "weights/model.safetensors", 1000), "changed since it was written")
    changed(
        lambda copy: ((copy / "recipe.yaml").unlink(), (copy / "recipe.yaml").symlink_to(whole / "recipe.yaml")),
        "missing",
    )
    changed(lambda copy: os.truncate(copy / "manifest.json", 10), "not readable")
    changed(lambda copy: (copy / "manifest.json").write_text("[]"), "not readable")
    changed(lambda copy: (copy / "manifest.json").write_bytes(b"\xff\xfe"), "not readable")


def test_a_manifest_of_another_format_is_refused_even_with_a_right_digest(tmp_path):
    import hashlib

    write(tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    data = json.loads(file.read_text()) | {"format": 2, "digest": "0" * 64}
    blank = json.dumps(data)
    file.write_text(blank.replace("0" * 64, hashlib.sha256(blank.encode()).hexdigest(), 1))
    with pytest.raises(DamagedError, match="unknown format"):
        open_artifact(tmp_path / "out")


def test_publishing_replaces_in_one_step_and_leaves_nothing_behind(tmp_path):
    write(tmp_path / "out", "first")
    write(tmp_path / "out", "second")
    assert (open_artifact(tmp_path / "out").path / "recipe.yaml").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_an_interrupted_write_leaves_the_old_artifact(tmp_path):
    write(tmp_path / "out", "first")
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "out") as staged:
        (staged / "recipe.yaml").write_text("second")
        raise KeyboardInterrupt
    assert (open_artifact(tmp_path / "out").path / "recipe.yaml").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_stay(tmp_path):
    dead, alive = tmp_path / ".out.staging-ab-999999999", tmp_path / f".out.staging-ab-{os.getpid()}"
    dead.mkdir()
    alive.mkdir()
    with staging(tmp_path / "out"):
        pass
    assert not dead.exists()
    assert alive.exists()


def test_no_artifact_and_no_room_are_said_plainly(tmp_path):
    with pytest.raises(MissingError, match="no artifact here"):
        open_artifact(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"), staging(tmp_path / "file" / "out"):
        pass
