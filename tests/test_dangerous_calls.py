"""One place for each risk: what runs code, unpacks archives or uses the network is in the table below or nowhere.

Reads the syntax of every file of the project, so that a new use fails here before anybody has to notice it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ["core/optkit", "plugins"]

ALLOWED = {
    ("core/optkit/plugins.py", "importlib.import_module"): "the one place where a plugin's `module:Class` is imported; "
    "the path comes from an installed distribution, never from a recipe or a request",
    (
        "core/optkit/__init__.py",
        "importlib.import_module",
    ): "lazy names of the package, out of a table in the same file",
    (
        "plugins/backends/optkit_backends/torchscript/files.py",
        "torch.jit.load",
    ): "the only way to read a TorchScript archive; opening the artifact has checked its hash, and the backend's page "
    "says that an archive is a program",
}
"""(file, what) and why it may be there. Think twice: prefer to move the code to a place that is here already."""

# Importing these is enough.
MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"),
    *("requests", "urllib.request", "urllib3", "httpx", "aiohttp", "http.client", "ftplib", "smtplib", "xmlrpc"),
}
# So is naming these, called or not.
NAMES = {
    *("eval", "exec", "compile", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("torch.load", "torch.jit.load", "torch.export.load", "torch.hub.load", "torch.hub.load_state_dict_from_url"),
    *("torch.serialization.load", "torch.package.PackageImporter", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("shutil.unpack_archive", "jinja2.Template", "jinja2.Environment", "jinja2.environment.Template"),
    "jinja2.environment.Environment",
}
# These take the name of what they import: a literal is an import like any other.
IMPORTERS = {
    "importlib.import_module",
    "__import__",
    "builtins.__import__",
    "pkgutil.resolve_name",
    "importlib.__import__",
}
METHODS = {"extractall"}
# Keywords of any call, and the one literal that they may have.
KEYWORDS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}


def origins(tree: ast.AST) -> dict[str, str]:
    """What names of a file stand for, by its imports, wherever they are."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: "numpy" + origin[2:] if origin == "np" else origin for name, origin in found.items()}


def dotted(node: ast.AST, known: dict[str, str]) -> str:
    """`a.b.c` of a name or an attribute, imports resolved; "" for anything else."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        value = dotted(node.value, known)
        return f"{value}.{node.attr}" if value else ""
    return ""


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_literal(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def of_call(node: ast.Call, known: dict[str, str]) -> Iterator[str]:
    name = dotted(node.func, known)
    if name in IMPORTERS and not is_literal(node.args[0] if node.args else None):
        yield name
    if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
        yield node.func.attr
    keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    for keyword, harmless in KEYWORDS.items():
        value = keywords.get(keyword)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is harmless):
            yield keyword
    if name in ("ruamel.yaml.YAML", "ruamel.yaml.main.YAML"):
        kind = keywords.get("typ", node.args[0] if node.args else None)
        if kind is not None and not (isinstance(kind, ast.Constant) and kind.value in ("safe", "rt")):
            yield "ruamel.yaml.YAML"


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that belongs into the table."""
    tree = ast.parse(source)
    known = origins(tree)
    for node in ast.walk(tree):
        found = set(of_call(node, known)) if isinstance(node, ast.Call) else set()
        for path in imported(node):
            parts = path.split(".")
            found |= {".".join(parts[:size]) for size in range(1, len(parts) + 1)} & (MODULES | NAMES)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            found |= {dotted(node, known)} & NAMES
        yield from ((getattr(node, "lineno", 0), what) for what in sorted(found))


@functools.cache
def in_project() -> list[tuple[str, int, str]]:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    return [
        (file.relative_to(ROOT).as_posix(), line, what)
        for file in files
        for line, what in dangers(file.read_text(encoding="utf-8"))
    ]


def test_dangerous_calls_are_where_the_table_says_and_nowhere_else() -> None:
    wrong = [f"{file}:{line}: {what}" for file, line, what in in_project() if (file, what) not in ALLOWED]
    assert wrong == []


def test_the_table_has_no_line_without_a_use() -> None:
    assert set(ALLOWED) - {(file, what) for file, _, what in in_project()} == set()


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "from pickle import loads",
            "import dill as d",
            "def f():\n    import marshal",
            "import shelve",
        ),
        *("import cloudpickle", "import joblib", "import _pickle"),
        *("import torch\ntorch.load(f)", "from torch import load", "import torch as t\ng = t.load"),
        *(
            "import torch\ntorch.jit.load(f)",
            "import torch.export\ntorch.export.load(f)",
            "from torch import jit\njit.load(f)",
        ),
        *(
            "import yaml\nyaml.load(f)",
            "from yaml import unsafe_load as load",
            "import yaml\nyaml.load_all(f, yaml.Loader)",
        ),
        *("from ruamel.yaml import YAML\nYAML(typ='unsafe')", "import ruamel.yaml\nruamel.yaml.YAML(typ=kind)"),
        *(
            "from ruamel.yaml import YAML as Y\nY('unsafe')",
            "eval('1')",
            "exec(code)",
            "compile(s, '', 'exec')",
            "map(eval, s)",
        ),
        *("import builtins\nbuiltins.exec(s)", "archive.extractall(p)", "tarfile.open(f).extractall()"),
        *("import shutil\nshutil.unpack_archive(f)", "import os\nos.system(s)", "from os import popen"),
        *("import subprocess\nsubprocess.run(s, shell=True)", "from subprocess import run\nrun(s, shell=flag)"),
        *("import importlib\nimportlib.import_module(name)", "from importlib import import_module as i\ni(f'a.{b}')"),
        *(
            "__import__(name)",
            "import pkgutil\npkgutil.resolve_name(path)",
            "import importlib\nimportlib.import_module()",
        ),
        *(
            "import numpy as np\nnp.load(f, allow_pickle=True)",
            "load(f, allow_pickle=flag)",
            "load(f, weights_only=False)",
        ),
        *("import jinja2\njinja2.Template(s)", "from jinja2 import Environment", "import jinja2 as j\nj.Environment()"),
        *(
            "import requests",
            "import urllib.request",
            "from urllib import request",
            "from urllib.request import urlopen",
        ),
        *("import httpx", "import aiohttp", "import http.client", "M.from_pretrained(p, trust_remote_code=True)"),
        "M.from_pretrained(p, trust_remote_code=trust)",
    ],
)
def test_each_danger_is_found(source: str) -> None:
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import torch\nmodel.eval()",
            "import torch\ntorch.compile(m)",
            "import re\nre.compile(p)",
            "self.compile(m)",
        ),
        *("from urllib.parse import unquote", "import http", "import importlib\nimportlib.import_module('optkit')"),
        *(
            "from ruamel.yaml import YAML\nYAML(typ='safe', pure=True)",
            "import json\njson.load(f)",
            "import yaml\nyaml.safe_load(f)",
        ),
        *("import numpy as np\nnp.save(f, a, allow_pickle=False)", "M.from_pretrained(p, trust_remote_code=False)"),
        *(
            "import subprocess\nsubprocess.run([a], shell=False)",
            "class A:\n    def compile(self): ...",
            "load(f, weights_only=True)",
        ),
        "from jinja2.sandbox import ImmutableSandboxedEnvironment",
    ],
)
def test_what_is_harmless_is_not_found(source: str) -> None:
    assert not list(dangers(source))
