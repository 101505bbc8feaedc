"""One flipped bit in a real artifact: no command runs on it."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys

import pytest

from optkit.artifact import open_artifact
from optkit.errors import DamagedError

COMMANDS = {
    "inspect": (),
    "explain": (),
    "generate": ("Hello",),
    "bench": (),
    "eval": (),
}


@pytest.fixture
def artifact(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.out, tmp_path / "artifact")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "artifact"


def flips(artifact, each):
    """Every file of it in turn with one bit flipped, at `each` random places."""
    chance = random.Random(0)
    files = sorted(file for file in artifact.rglob("*") if file.is_file())
    assert len(files) >= 10
    for file in files:
        content = file.read_bytes()
        for bit in chance.sample(range(8 * len(content)), each):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            yield file
        file.write_bytes(content)


def test_opening_refuses_each(artifact):
    for file in flips(artifact, 10):
        with pytest.raises(DamagedError) as refused:
            open_artifact(artifact)
        assert refused.value.where == str(file)
    open_artifact(artifact)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_end_with_3_and_name_the_file(artifact, command, monkeypatch, capsys):
    from optkit.cli import main

    for file in flips(artifact, 2):
        monkeypatch.setattr(sys, "argv", ["optkit", command, "artifact", *COMMANDS[command]])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (3, "")
        assert err.startswith(f"optkit: {file.relative_to(artifact.parent)}: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "bench", "generate"])
def test_so_does_a_process_of_its_own(artifact, command):
    file = artifact / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    arguments = [sys.executable, "-m", "optkit.cli", command, "artifact", *COMMANDS[command]]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    expected = "artifact/weights/model.safetensors: changed since it was written; apply the recipe again"
    assert done.stderr == f"optkit: {expected}\n"


def test_a_folder_linked_into_the_weights_is_refused(artifact, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (artifact / "weights" / "custom_code").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match="custom_code: not in the manifest"):
        open_artifact(artifact)
