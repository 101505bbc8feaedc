"""What both backends on Inductor must do: torch_compile and aot_inductor. Most of it compiles for minutes."""

from __future__ import annotations

import pytest

from optkit.testing import check_backend
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
