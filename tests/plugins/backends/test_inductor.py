"""What both backends on Inductor must do: torch_compile and aot_inductor. Most of it compiles for minutes."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from optkit.steps import Limits, Row, StepPlan
from optkit.testing import check_backend
from optkit.weights import save_folder
from optkit_backends.aot_inductor import AOTInductor
from optkit_backends.torch_compile import TorchCompile
from optkit_quantize.kv_cache import KVCache
from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts

JIT, AHEAD = TorchCompile(), AOTInductor()
REASONS = {JIT: JIT.unavailable(), AHEAD: AHEAD.uncompilable()}
pytestmark = pytest.mark.timeout(1800)
TRANSFORMS = {
    "float": lambda model: model,
    "int8": lambda model: RTN(bits=8, granularity="group", group_size=32).apply(model, context(texts())),
}


@pytest.fixture(params=["torch_compile", "aot_inductor"])
def backend(request):
    return JIT if request.param == "torch_compile" else AHEAD


@pytest.fixture
def compiler(backend):
    if REASONS[backend] is not None:
        pytest.skip(REASONS[backend])
    return backend


def test_lowering_says_which_kernel_runs_or_why_none_can(backend):
    tags = {"task:causal-lm", "weights:int4-group", "weights:bnb-nf4", "activations:int4", "kv:fp8-head"}
    lowered = backend.lowering(frozenset(tags))
    assert lowered["weights:float"].native
    assert (lowered["weights:int4-group"].possible, lowered["weights:int4-group"].native) == (True, False)
    refused = {tag for tag, how in lowered.items() if not how.possible}
    assert refused == {"weights:bnb-nf4", "activations:int4", "kv:fp8-head"}
    assert not backend.lowering(frozenset({"task:image"}))["task:image"].possible


@pytest.mark.slow
@pytest.mark.parametrize("weights", TRANSFORMS)
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_it_conforms(compiler, kind, weights, tiny_llama, tiny_bert):
    check_backend(compiler, TRANSFORMS[weights](tiny_llama() if kind == "decoder" else tiny_bert()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_quantized_kv_cache_conforms(compiler, dtype, tiny_llama):
    check_backend(compiler, KVCache(dtype=dtype).apply(tiny_llama(), context(texts(*[24] * 4))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_profile_names_every_linear_layer_and_counts_its_operations(compiler, kind, tiny_llama, tiny_bert, tmp_path):
    model, tokens = tiny_llama() if kind == "decoder" else tiny_bert(), 41
    save_folder(model, tmp_path / "weights")
    (tmp_path / "compiled").mkdir()
    compiler.compile(model, tmp_path / "compiled")
    with compiler.open(tmp_path / "compiled", tmp_path / "weights", Limits(2, 64)) as session:
        if kind == "decoder":
            times = session.profile(StepPlan((Row(1, tuple(range(tokens - 1)), 0, (0, 1, 2)), Row(2, (7,), 0, (3,)))))
        else:
            ids = np.arange(5, 5 + tokens)[None]
            times = session.profile({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    linears = {name: layer.weight for name, layer in model.module.named_modules() if isinstance(layer, nn.Linear)}
    linears = {name: weight for name, weight in linears.items() if not name.startswith("pooler")}  # gives no output
    found = {time.layer: time for time in times if time.layer in linears}
    assert set(found) == set(linears)
    assert any("fused" in time.kernel for time in times)
    for name, weight in linears.items():
        assert found[name].weight_bytes == weight.nbytes
        rows = 2 if name == "lm_head" else tokens
        # The profiler does not see the shapes of what is compiled ahead of time.
        assert found[name].operations == (2 * rows * weight.numel() if compiler is JIT else 0)
