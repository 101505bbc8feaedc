"""A tiny model, a text and recipes in one folder; one finished apply that the tests of all workers start from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from optkit.apply import Outcome, apply, make_plan
from optkit.hookspecs import hookimpl
from optkit.plugins import Plugins
from optkit.recipe import load_recipe

PARAGRAPH = "Model number {} reads token {} of a text, and answers with the next one: what is the capital of France?"
TRANSFORMS = ({"prune.magnitude": {"sparsity": 0.3}}, {"quantize.rtn": {"bits": 8}})
WATCHER = """
import json, os
from optkit.hookspecs import hookimpl

def tell(**facts):
    with open(os.environ["WATCHED"], "a") as log:
        log.write(json.dumps({"pid": os.getpid(), **facts}) + "\\n")

@hookimpl
def step_started(step):
    tell(event="started", step=step)

@hookimpl
def step_finished(step, report):
    tell(event="finished", step=step, key=report["key"], cached=report["cached"])
"""


@dataclass(eq=False)  # pluggy takes equal plugins for one
class Events:
    """An observer: what it was told, in order."""

    started: list[str] = field(default_factory=list)
    finished: list[tuple[str, bool]] = field(default_factory=list)
    stop_at: str | None = None
    """The step at whose start the user interrupts."""

    @hookimpl
    def step_started(self, step: str) -> None:
        self.started.append(step)
        if step == self.stop_at:
            raise KeyboardInterrupt

    @hookimpl
    def step_finished(self, step: str, report: Any) -> None:
        self.finished.append((step, report["cached"]))

    @property
    def made(self) -> list[str]:
        return [step for step, cached in self.finished if not cached]

    @property
    def found(self) -> list[str]:
        return [step for step, cached in self.finished if cached]


@dataclass(frozen=True)
class Desk:
    """A folder to work in."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    def recipe(self, **changes: Any) -> Path:
        """A recipe file, written anew; `changes` replace its keys. JSON is YAML too."""
        keys: dict[str, Any] = {
            "name": "tiny",
            "model": {"hf": {"model": str(self.model)}},
            "transforms": list(TRANSFORMS),
            "backend": "torch",
            "evaluation": {"dataset": {"text_file": {"path": str(self.text)}}, "tokens": 256, "context_length": 64},
            "benchmark": {"prompt_tokens": 16, "output_tokens": 8, "blocks": 3},
            "gates": [],
        }
        file = self.folder / "recipe.yaml"
        file.write_text(f"# of a test\n{json.dumps(keys | changes, indent=1)}\n", encoding="utf-8")
        return file


@dataclass(frozen=True)
class Finished:
    """An apply with two transforms that ended well, and the cache that it left."""

    desk: Desk
    out: Path
    cache: Path
    events: Events


def run_apply(
    recipe: Path, out: Path, observers: Iterable[object] = (), *, overwrite: bool = False, third_party: bool = False
) -> Outcome:
    plugins = Plugins.load(third_party=third_party)
    for number, observer in enumerate(observers):
        plugins.register(observer, f"observer {number}")
    plan = make_plan(load_recipe(recipe, plugins), plugins)
    return apply(plan, plugins, out, progress=lambda *_: None, overwrite=overwrite)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Outcome]:
    """`run(recipe, out, observers=(), overwrite=False, third_party=False)` applies in this process."""
    return run_apply


@pytest.fixture
def events() -> type[Events]:
    return Events


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Shared, also between the processes of pytest-xdist: look, copy, and leave it as it is."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished-apply"
    desk, record = Desk(shared), shared / "events.json"
    with FileLock(f"{shared}.lock"):
        if not record.exists():
            shutil.rmtree(shared, ignore_errors=True)
            shutil.copytree(tiny_folder, desk.model)
            desk.text.write_text("\n\n".join(PARAGRAPH.format(n, n * 7) for n in range(40)), encoding="utf-8")
            told = Events()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OPTKIT_CACHE", str(shared / "cache"))
                # Named as the other side of the comparison is: the two must not be mixed up.
                run_apply(desk.recipe(name="baseline"), shared / "out", [told])
            shutil.copyfile(shared / "recipe.yaml", shared / "given.yaml")
            record.write_text(json.dumps([told.started, told.finished]))
    started, ended = json.loads(record.read_text())
    return Finished(desk, shared / "out", shared / "cache", Events(started, [(step, hit) for step, hit in ended]))


@pytest.fixture
def desk(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A folder of this test's own; its recipes name the shared model and text, its cache starts as a copy."""
    folder = tmp_path / "desk"
    folder.mkdir()
    shutil.copytree(finished.cache, folder / "cache")
    monkeypatch.setenv("OPTKIT_CACHE", str(folder / "cache"))

    class Own(Desk):
        model, text = finished.desk.model, finished.desk.text

    return Own(folder)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`install(name, source)` installs a plugin of that name as pip would, for this process and those it starts."""
    site = tmp_path / "site"
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(site)

    def add(name: str, source: str) -> None:
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[optkit]\n{name} = {name}\n")

    return add


@dataclass
class Watched:
    """Processes of the command line, and what an observer in each of them wrote down."""

    log: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """`optkit ARGUMENTS` as the leader of a process group of its own."""
        command = [sys.executable, "-m", "optkit.cli", *map(str, arguments)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.processes.append(process)
        return process

    def lines(self, pid: int | None = None) -> list[dict[str, Any]]:
        """Everything told, or what one process told."""
        told = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        return [line for line in told if pid is None or line["pid"] == pid]


@pytest.fixture
def watched(install: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts `optkit` with an observer that writes down the steps; what still runs at the end is killed."""
    install("optkit_watch", WATCHER)
    monkeypatch.setenv("WATCHED", str(tmp_path / "watched.jsonl"))
    watched = Watched(tmp_path / "watched.jsonl")
    yield watched
    for process in watched.processes:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate()
