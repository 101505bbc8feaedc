"""Artifacts that open in milliseconds, in this process and in others: the backend is a scripted plugin."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from optkit.artifact import publish, staging

PLUGIN = Path(__file__).with_name("optkit_scripted.py")


@pytest.fixture
def scripted_plugin(tmp_path, monkeypatch):
    """The plugin, installed for this process and for those that it starts."""
    site = tmp_path / "site"
    info = site / "optkit_scripted-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(PLUGIN, site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: optkit_scripted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[optkit]\noptkit_scripted = optkit_scripted\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


@pytest.fixture
def real(tiny_folder, tmp_path):
    """An artifact of a real model that torch runs with continuous batching."""
    recipe = {"backend": {"torch": {}}, "batching": {"continuous": {"max_batch_size": 4}}}
    facts = {"name": "real", "recipe": recipe, "recipe_hash": "", "tags": [], "max_batch_size": 4, "max_length": 64}
    facts |= {"steps": [], "servable_by": [], "machine": {}}
    target = tmp_path / "real"
    with staging(target) as staged:
        (staged / "runtime").mkdir()
        shutil.copytree(tiny_folder, staged / "weights")
        publish(staged, target, facts)
    return target


@pytest.fixture
def scripted(scripted_plugin, tiny_tokenizer, tmp_path):
    """`scripted(seconds)` makes an artifact whose steps take so long."""

    def make(seconds: float = 0.0, *, batch: int = 4, name: str = "scripted") -> Path:
        recipe = {"backend": {"scripted": {"seconds": seconds}}, "batching": {"continuous": {"max_batch_size": batch}}}
        facts = {"name": name, "recipe": recipe, "recipe_hash": "", "tags": [], "max_batch_size": batch}
        facts |= {"max_length": 128, "steps": [], "servable_by": [], "machine": {}}
        target = tmp_path / name
        with staging(target) as staged:
            (staged / "runtime").mkdir()
            tiny_tokenizer.save_pretrained(staged / "weights")
            publish(staged, target, facts)
        return target

    return make
