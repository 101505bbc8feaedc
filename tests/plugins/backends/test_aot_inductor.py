"""The aot_inductor backend against transformers and eager modules, and its files. Most of it compiles for minutes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from optkit import hardware
from optkit.errors import DamagedError, MachineError, RecipeError
from optkit.plugins import Plugins
from optkit.steps import Limits, TensorSpec
from optkit_backends.aot_inductor import AOTInductor
from optkit_backends.aot_inductor.compiling import compile_tensors
from tests.damaging import HARMS, damage

BACKEND = AOTInductor()
LIMITS = Limits(max_batch_size=4, max_length=64)
REASON = BACKEND.uncompilable()
compiles = pytest.mark.skipif(REASON is not None, reason=REASON or "")
pytestmark = pytest.mark.timeout(1800)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(image).softmax(-1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    if REASON is not None:
        pytest.skip(REASON)
    torch.manual_seed(0)
    module, folder = Small().eval(), tmp_path_factory.mktemp("small")
    compile_tensors(module, {"image": torch.rand(2, 8)}, folder)
    return module, folder


def distance(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_any_module_runs_for_any_batch(small):
    module, folder = small
    assert {file.name for file in folder.iterdir()} == {"model.pt2", "tensors.json"}
    with BACKEND.open(folder, folder, LIMITS) as session:
        assert session.inputs == {"image": TensorSpec("float32", (None, 8))}
        assert session.outputs == {"output": TensorSpec("float32", (None, 3))}
        # By rows, by columns, and every other one: what was compiled reads rows.
        images = [torch.rand(batch, 8) for batch in (1, 2, 7)]
        for image in (*images, torch.rand(8, 7).T, torch.rand(7, 16)[:, ::2]):
            found = session.run({"image": image.numpy()})["output"]
            with torch.inference_mode():
                assert distance(found, module(image).numpy()) < 1e-5


def test_opening_needs_neither_compiler_nor_transformers(small, tmp_path):
    code = (
        "import sys; import numpy as np; from pathlib import Path; from optkit.steps import Limits;"
        "from optkit_backends.aot_inductor import AOTInductor;"
        f"folder = Path({str(small[1])!r}); backend = AOTInductor();"
        "assert backend.uncompilable() and not backend.unavailable();"
        "session = backend.open(folder, folder, Limits(1, 8));"
        "print(session.run({'image': np.ones((1, 8), np.float32)})['output'].shape);"
        "assert 'transformers' not in sys.modules"
    )
    env = os.environ | {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
    assert done.stdout == "(1, 3)\n"


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_files_are_refused_in_one_line(harm, small, tmp_path):
    for file in small[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    package, facts = tmp_path / "model.pt2", tmp_path / "tensors.json"
    damage(harm, package, facts)
    with pytest.raises(DamagedError) as raised:
        BACKEND.open(tmp_path, tmp_path, LIMITS)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("torch", "2.0.0", r"torch 2\.0\.0 compiled it, and its machine code runs on no other version, found"),
        ("isa", [*hardware.isa(), "avx1024"], r"this processor has no avx1024, found .*; compile it again here$"),
        ("processor", "z80", r"compiled for z80 .*, and this processor has no z80, found '" + platform.machine()),
    ],
)
def test_packages_for_other_machines_are_refused_in_one_line(name, value, words, small, tmp_path):
    for file in small[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = tmp_path / "tensors.json"
    record = json.loads(facts.read_text())
    record["facts"][name] = value
    facts.write_text(json.dumps(record))
    with pytest.raises(MachineError, match=words):
        BACKEND.open(tmp_path, tmp_path, LIMITS)


@compiles
def test_what_cannot_be_exported_is_refused(tmp_path):
    class Branching(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.cos() if image.sum() > 0 else image.sin()

    with pytest.raises(RecipeError, match=r"^Branching: torch\.export cannot record it \(.*; choose another backend$"):
        compile_tensors(Branching().eval(), {"image": torch.rand(2, 4)}, tmp_path)


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    expected = "needs a C++ compiler, and there is no no-such-compiler; install it, or set CXX to one"
    assert (BACKEND.unavailable(), BACKEND.uncompilable()) == (None, expected)
    plugins = Plugins.load(third_party=False)
    assert plugins.state(plugins.find("backend", "aot_inductor")) == expected
