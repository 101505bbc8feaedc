"""The `aot_inductor` backend: exported models as machine code, compiled once and opened without Python's tracing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optkit.backends import Backend, Lowering, TensorSession, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit_backends.graphs.inductor import COMPILING_BYTES, compiler_missing
from optkit_backends.graphs.lowering import graph_lowering
from optkit_backends.tasks import ONE_CALL

__all__ = ["AOTInductor"]


class AOTInductor(Backend):
    """A package of AOTInductor: the model as a shared library with its weights, for this processor and this torch.

    What stands between the matrix products becomes a few fused C++ kernels, in float32. Compiling takes minutes and a
    C++ compiler; opening takes neither, nor transformers. A package runs on processors with the vector extensions of
    the one that compiled it, under the version of torch that did, and is refused elsewhere.

    Integer weights are dequantized when they are compiled, so that the package is as large as the float model. Language
    models keep their KV cache in blocks of 16 tokens, so that any batching strategy runs: a step runs all rows with one
    new token, padded to the longest of them, and one row with several at once.

    A package is machine code: open none whose maker you do not trust.

    Document: https://docs.pytorch.org/docs/2.13/user_guide/torch_compiler/torch.compiler_aot_inductor.html
    """

    def unavailable(self) -> str | None:
        return None  # torch is a dependency of optkit itself

    def uncompilable(self) -> str | None:
        return compiler_missing()

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        reason = "dequantized when compiled, so that the package holds float32"
        return graph_lowering(tags, "at::mm_out in float32", reason)

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # The float weights that are exported, their bytes as inductor writes them, and the library that checks map.
        return 3 * card.parameters * 4 + COMPILING_BYTES

    def compile(self, model: Model, directory: Path) -> None:
        from optkit_backends.aot_inductor.compiling import compile_decoder, compile_model

        if model.tags & ONE_CALL:
            compile_model(model, directory)
        else:
            compile_decoder(model.module, directory)

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession | TensorSession:
        from optkit_backends.aot_inductor.files import PackagedTensors

        if (runtime / PackagedTensors.FILE).exists():
            from optkit_backends.aot_inductor.tensors import AOTInductorTensorSession

            return AOTInductorTensorSession(runtime)
        from optkit_backends.aot_inductor.session import AOTInductorSession

        return AOTInductorSession(runtime, limits)
