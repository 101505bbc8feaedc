"""The `torch_compile` backend: transformers' modules, compiled by `torch.compile` when they are opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optkit.backends import Backend, Lowering, TensorSession, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit.weights import folder_task
from optkit_backends.graphs.inductor import COMPILING_BYTES, compiler_missing, headers_missing
from optkit_backends.graphs.lowering import graph_lowering
from optkit_backends.tasks import ONE_CALL

__all__ = ["TorchCompile"]


class TorchCompile(Backend):
    """`torch.compile`: what stands between the matrix products becomes a few fused C++ kernels, in float32.

    Nothing is compiled beforehand: each process compiles when it opens the model, once for all batch sizes and lengths
    and before the first request. On two cores that takes 20 s for MiniLM and 100 s for SmolLM2-135M the first time;
    later, kernels come from the folder `inductor` of optkit's cache. Take `aot_inductor` to compile once and open
    quickly.

    Integer weights are dequantized when the session opens. Language models keep their KV cache in blocks of 16 tokens,
    so that any batching strategy runs: a step runs all rows with one new token, padded to the longest of them, and one
    row with several at once. A model that cannot be compiled as one graph is refused when it is opened.

    Document: https://docs.pytorch.org/docs/2.13/torch.compiler.html
    """

    def unavailable(self) -> str | None:
        return compiler_missing() or headers_missing()

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        return graph_lowering(tags, "aten::mm in float32", "dequantized when opened, so only files shrink")

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # The weights that are opened, and once more while they are compiled.
        return 2 * card.parameters * 4 + COMPILING_BYTES

    def compile(self, model: Model, directory: Path) -> None:
        """Write nothing: the `weights` folder is all that the session needs."""

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession | TensorSession:
        if folder_task(weights) in ONE_CALL:
            from optkit.weights import load_folder
            from optkit_backends.graphs.tensors import TensorGraph
            from optkit_backends.torch_compile.tensors import TorchCompileTensorSession

            return TorchCompileTensorSession(TensorGraph.of_model(load_folder(weights)))
        from optkit_backends.torch_compile.session import TorchCompileSession

        return TorchCompileSession(weights, limits)
