"""The command line as a user has it: a folder with a model, a text and recipes, and nothing of this machine."""

from __future__ import annotations

import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and model number {} reads token {} of its text.",
    "What is the capital of country {}? It is city {}, as everybody knows who has been there.",
)
TEXT = "\n\n".join(SENTENCES[number % 2].format(number, number * 7 % 97) for number in range(120)) + "\n"


@dataclass(frozen=True)
class Said:
    """What a command came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def optkit(monkeypatch, capsys):
    """`optkit("plan", "recipe.yaml")` runs the command line in this process."""
    from optkit.cli import main

    def run(*arguments: str | Path) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["optkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Said(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def desk(tmp_path, tiny_folder, monkeypatch):
    """The current directory: `model/` and `text.txt`; the cache is `cache/` in it."""
    folder = tmp_path / "desk"
    furnish(folder, tiny_folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPTKIT_CACHE", "cache")
    return folder


@pytest.fixture(scope="module")
def furnished(tmp_path_factory, tiny_folder):
    """Such a directory for a whole module; tests go there themselves."""
    folder = tmp_path_factory.mktemp("desk")
    furnish(folder, tiny_folder)
    return folder


def furnish(folder: Path, model: Path) -> None:
    folder.mkdir(exist_ok=True)
    shutil.copytree(model, folder / "model")
    (folder / "text.txt").write_text(TEXT)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path where distributions can be put: `site(name, module text)` returns the folder."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def add(name: str, text: str) -> Path:
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
        info = folder / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[optkit]\n{name} = {name}\n")
        return folder

    yield add
    for name, module in list(sys.modules.items()):
        if str(folder) in str(getattr(module, "__file__", None)):
            del sys.modules[name]
