"""Benchmarks run by hand alone, for minutes: here they only import what they take from optkit and from each other."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if "__main__" in path.read_text())


def test_there_are_benchmarks():
    assert {"growth.py", "pruners.py", "runtimes.py"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_benchmark_finds_what_it_imports(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])  # as Python has it for a script
    before = set(sys.modules)
    try:
        runpy.run_path(str(path))
    finally:
        # What stands beside a script must not be taken for another's of that name.
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT)):
                del sys.modules[name]
