"""The guide for authors of plugins, followed to the letter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parents[2] / "docs/plugins.md").read_text(encoding="utf-8")


def block_after(words: str) -> str:
    """The first code block below these words."""
    found = re.search(rf"{re.escape(words)}.*?```\w+\n(.*?)```", GUIDE, re.DOTALL)
    assert found is not None, f"the guide says nothing about {words}"
    return found[1]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files and the recipe as the guide has them, the plugin installed into `site`."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("pyproject.toml", "optkit_clip.py", "clip.yaml"):
        (desk / name).write_text(block_after(f"`{name}`:"), encoding="utf-8")
    # What `pip install -e .` does for the import path, without touching the environment that runs the tests.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", desk / "site", desk], check=True)
    return desk


def run(desk: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = command.split()
    assert words[0] == "optkit"
    environment = os.environ | {"PYTHONPATH": str(desk / "site"), "OPTKIT_CACHE": str(desk / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "optkit.cli", *words[1:]],
        cwd=desk,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_after_installation_it_is_there(desk: Path) -> None:
    install, listing, showing = block_after("Install it into the environment").splitlines()
    assert install == "pip install -e ."
    listed = run(desk, listing)
    assert listed.returncode == 0
    (promised,) = re.findall(r"The list now has `(.*?)`", GUIDE)
    assert promised.split() in [line.split() for line in listed.stdout.splitlines()]
    shown = run(desk, showing)
    assert "Limits the magnitude of every linear layer's weights." in shown.stdout
    assert re.search(r"^limit +1\.0 +Largest magnitude that a weight keeps\.$", shown.stdout, re.MULTILINE)


def test_its_recipe_plans(desk: Path, smollm2: Path) -> None:
    plan, apply = block_after("- clip: {limit: 0.5}\n```").splitlines()
    assert apply == "optkit apply clip.yaml"
    planned = run(desk, plan)
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "step 1   clip: weights-clipped" in planned.stdout


def test_a_wrong_option_is_refused_at_its_place(desk: Path) -> None:
    text = (desk / "clip.yaml").read_text(encoding="utf-8")
    (desk / "wrong.yaml").write_text(text.replace("limit: 0.5", "limit: -1"), encoding="utf-8")
    refused = run(desk, "optkit plan wrong.yaml")
    assert refused.returncode == 2
    assert refused.stderr == ("optkit: wrong.yaml:4:12: transforms[0].clip.limit: must be more than 0, found -1\n")


def test_the_schema_tells_editors_about_it(desk: Path) -> None:
    schema = json.loads(run(desk, "optkit schema").stdout)
    limit = schema["$defs"]["Clip"]["properties"]["limit"]
    assert limit["exclusiveMinimum"] == 0
    assert limit["description"] == "Largest magnitude that a weight keeps."
