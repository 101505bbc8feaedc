"""Does a piece of work in forked processes, each killed at a later system call, and looks at what it left.

Run as `python dying.py publish|fallback|cache|apply FOLDER [RECIPE]`; prints a JSON object with the number of kills.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optkit.apply import Outcome, apply, make_plan
from optkit.apply.cache import StepCache
from optkit.artifact import open_artifact, publish, staging
from optkit.errors import MissingError
from optkit.plugins import Plugins
from optkit.recipe import load_recipe

SYSTEM = {"posix", "io", "_io", "fcntl"}
FACTS: dict[str, Any] = {"name": "n", "recipe": {}, "recipe_hash": "", "tags": [], "max_batch_size": 1, "max_length": 8}
FACTS |= {"steps": [], "servable_by": [], "machine": {}}


def kill_at(number: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that kills itself right before its `number`-th system call; whether it came to that."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, status
        return killed
    calls = 0

    def count(frame: Any, event: str, function: Any) -> None:
        nonlocal calls
        if event == "c_call" and (function.__module__ in SYSTEM or type(function.__self__).__module__ in SYSTEM):
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.setprofile(count)
        work()
        code = 0
    finally:
        os._exit(code)


def write(target: Path, content: str) -> None:
    with staging(target) as staged:
        (staged / "weights").mkdir()
        (staged / "weights" / "model.safetensors").write_text(content * 10_000)
        (staged / "recipe.yaml").write_text(content)
        publish(staged, target, FACTS)


def content_of(target: Path) -> str | None:
    try:
        open_artifact(target)
    except MissingError:
        assert not target.exists()
        return None
    return (target / "recipe.yaml").read_text()


def publishing(folder: Path, *, exchange: bool) -> dict[str, int]:
    """Old or new at every moment; without an atomic exchange the old one comes back with the next attempt."""
    seen = {"kills": 0, "absent": 0, "old": 0, "new": 0}
    if not exchange:
        ctypes.CDLL = lambda *_, **__: object()  # type: ignore[assignment,misc]
    for before in (None, "old") if exchange else ("old",):
        number, killed = 0, True
        while killed:
            number += 1
            target = folder / f"{before} {number}" / "out"
            if before is not None:
                write(target, before)
            killed = kill_at(number, lambda target=target: write(target, "new"))
            seen["kills"] += killed
            found = content_of(target)
            seen[found or "absent"] += killed
            assert found in ({before, "new"} if exchange else {before, "new", None}), (number, found)
            if found is None and before is not None:
                with staging(target):
                    pass
                assert content_of(target) == before
            write(target, "newest")
            assert content_of(target) == "newest"
            assert os.listdir(target.parent) == ["out"], os.listdir(target.parent)
    return seen


def caching() -> dict[str, int]:
    """The step is there whole or it is made again, and then nothing else is left."""
    seen = {"kills": 0, "found": 0}
    cache = StepCache()

    def work(directory: Path) -> dict[str, Any]:
        (directory / "inner").mkdir()
        (directory / "inner" / "weights").write_bytes(b"weights")
        return {"loss": 0.5}

    for damaged in (False, True):
        number, killed = 0, True
        while killed:
            number += 1
            key = f"{damaged}-{number}"
            if damaged:
                cache.run(key, "a step", lambda directory: {"loss": 2.0})
                (cache.root / key / "data" / "more").touch()
            killed = kill_at(number, lambda key=key: cache.run(key, "a step", work))
            step = cache.run(key, "a step", work)
            assert step.report == {"loss": 0.5}
            assert (step.data / "inner" / "weights").read_bytes() == b"weights"
            assert not os.listdir(cache.root.parent / "work")
            seen["kills"] += killed
            seen["found"] += killed and step.hit
    return seen


def applying(folder: Path, recipe: Path) -> dict[str, int]:
    """An apply whose steps are all cached: absent or whole, over nothing and over an earlier artifact.

    Of its some two thousand system calls every thirty-seventh.
    """
    plugins, out = Plugins.load(third_party=False), folder / "out"
    plan = make_plan(load_recipe(recipe, plugins), plugins)

    def work(overwrite: bool) -> Outcome:
        return apply(plan, plugins, out, progress=lambda *_: None, overwrite=overwrite)

    seen = {"kills": 0, "absent": 0, "whole": 0}
    for overwrite in (False, True):
        number, killed = 1, True
        while killed:
            number += 37
            killed = kill_at(number, lambda overwrite=overwrite: work(overwrite))
            there = out.exists()
            assert there or not overwrite
            if there:
                open_artifact(out)
            seen["kills"] += killed
            seen["whole" if there else "absent"] += killed
            if not overwrite:
                shutil.rmtree(out, ignore_errors=True)
        assert all(step.hit for step in work(True).steps)
        open_artifact(out)
        assert sorted(os.listdir(folder)) == ["cache", "out", "recipe.yaml"], os.listdir(folder)
        assert not os.listdir(folder / "cache" / "work")
    return seen


if __name__ == "__main__":
    task, place = sys.argv[1], Path(sys.argv[2])
    if task == "cache":
        counts = caching()
    elif task == "apply":
        counts = applying(place, Path(sys.argv[3]))
    else:
        counts = publishing(place, exchange=task == "publish")
    sys.stdout.write(json.dumps(counts))
