"""The torch_compile backend against transformers and eager modules. Most of it compiles for minutes."""

from __future__ import annotations

import gc
import sys
import sysconfig
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from optkit.errors import RecipeError
from optkit.locations import cache_root
from optkit.model import Model
from optkit.plugins import Plugins
from optkit.steps import TensorSpec
from optkit.testing import check_backend
from optkit_backends.graphs.tensors import TensorGraph
from optkit_backends.torch_compile import TorchCompile
from optkit_backends.torch_compile.tensors import TorchCompileTensorSession
from tests.architectures import OTHERS, other

BACKEND = TorchCompile()
REASON = BACKEND.unavailable()
compiles = pytest.mark.skipif(REASON is not None, reason=REASON or "")
pytestmark = pytest.mark.timeout(1800)


class Small(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(8, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(image).softmax(-1)


def of_images(module):
    return TorchCompileTensorSession(TensorGraph.of(module.eval(), {"image": torch.rand(2, 8)}))


def distance(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@compiles
def test_modules_run_beside_each_other_for_any_batch_and_leave_their_kernels_in_the_cache():
    modules = [Small(), Small(classes=5)]
    sessions = [of_images(module) for module in modules]
    assert sessions[0].inputs == {"image": TensorSpec("float32", (None, 8))}
    assert sessions[0].outputs == {"output": TensorSpec("float32", (None, 3))}
    # By rows, by columns, and every other one: what was compiled reads rows.
    images = [torch.rand(batch, 8) for batch in (1, 2, 7)]
    images += [torch.rand(8, 7).T, torch.rand(7, 16)[:, ::2]]
    for image in images:
        for module, session in zip(modules, sessions, strict=True):
            # Nothing is compiled after opening.
            with torch.compiler.set_stance("fail_on_recompile"):
                found = session.run({"image": image.numpy()})["output"]
            with torch.inference_mode():
                assert distance(found, module(image).numpy()) < 1e-5
    assert any((cache_root() / "inductor").iterdir())
    weights = [weakref.ref(module.head.weight) for module in modules]
    for session in sessions:
        session.close()
    del module, modules
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


@compiles
def test_what_cannot_be_compiled_is_refused():
    class Branching(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.cos() if image.sum() > 0 else image.sin()

    with pytest.raises(RecipeError, match=r"^Branching: torch\.export cannot record it \(.*; choose another backend$"):
        of_images(Branching())


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    expected = "needs a C++ compiler, and there is no no-such-compiler; install it, or set CXX to one"
    assert BACKEND.unavailable() == expected
    plugins = Plugins.load(third_party=False)
    assert plugins.state(plugins.find("backend", "torch_compile")) == expected


def test_without_pythons_headers_it_says_what_to_install(monkeypatch, tmp_path):
    if sys.platform == "darwin":
        pytest.skip("a framework always has them")
    monkeypatch.setenv("CXX", sys.executable)  # any program
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    assert BACKEND.unavailable() == (
        f"needs Python's headers, and there is no Python.h in {tmp_path}; install the package python3-dev or its like"
    )


@compiles
@pytest.mark.slow
def test_layers_with_and_without_a_window_conform(tmp_path):
    module = other(OTHERS["qwen2"](), tmp_path / "weights").module
    check_backend(BACKEND, Model(module, None, frozenset({"task:causal-lm", "weights:float"})))
