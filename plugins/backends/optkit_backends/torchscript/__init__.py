"""The `torchscript` backend: traced and frozen graphs, for programs that already run TorchScript."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optkit.backends import Backend, Lowering, TensorSession, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit_backends.graphs.lowering import graph_lowering
from optkit_backends.tasks import ONE_CALL

__all__ = ["TorchScript"]


class TorchScript(Backend):
    """A TorchScript archive: the model's operators, recorded once and frozen with their weights, without its Python.

    PyTorch has deprecated TorchScript, and names `torch.export` as its successor: take this backend where a program
    loads TorchScript archives already, for instance from C++, and another one otherwise. Saves the time that Python
    takes between operators, and the time that transformers takes to import; the operators are those of the `torch`
    backend, in float32.

    `torch.jit.optimize_for_inference` is left out. It makes linear layers products with transposed weights: on two
    cores a tenth to a fifth faster for a single short row, and a tenth slower for batches.

    Integer weights are dequantized when they are compiled, so that the archive is as large as the float model's.
    Language models keep their KV cache in blocks of 16 tokens, so that any batching strategy runs: a step runs all rows
    with one new token, padded to the longest of them, and one row with several at once.

    An archive is a program of torch's operators, some of which read and write files: open none whose maker you do not
    trust.

    Document: https://docs.pytorch.org/docs/2.13/jit.html
    """

    def unavailable(self) -> str | None:
        return None  # torch is a dependency of optkit itself

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        reason = "dequantized when compiled, so that the archive holds float32"
        return graph_lowering(tags, "aten::linear in float32", reason)

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # The float weights that are traced and those of the archive, which is written from memory.
        return 2 * card.parameters * 4

    def compile(self, model: Model, directory: Path) -> None:
        from optkit_backends.torchscript.tracing import compile_decoder, compile_model

        if model.tags & ONE_CALL:
            compile_model(model, directory)
        else:
            compile_decoder(model.module, directory)

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession | TensorSession:
        from optkit_backends.torchscript.files import ArchivedTensors

        if (runtime / ArchivedTensors.FILE).exists():
            from optkit_backends.torchscript.tensors import TorchScriptTensorSession

            return TorchScriptTensorSession(runtime)
        from optkit_backends.torchscript.session import TorchScriptSession

        return TorchScriptSession(runtime, limits)
