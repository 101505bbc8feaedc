"""The `torchscript` backend: traced and frozen graphs, for programs that already run TorchScript."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from optkit.backends import Backend, Lowering, TensorSession, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit.weights import CAUSAL_LM, FEATURE_EXTRACTION

__all__ = ["TorchScript"]

ACTIVATIONS = re.compile(r"activations:(int8|fp8)-(dynamic|static)(-asym)?")
CACHES = ("kv:int8-head", "kv:int8-tensor")
LINEAR = "aten::linear in float32"


class TorchScript(Backend):
    """A TorchScript archive: the model's operators, recorded once and frozen with their weights, without its Python.

    PyTorch has deprecated TorchScript, and names `torch.export` as its successor: take this backend where a program
    loads TorchScript archives already, for instance from C++, and another one otherwise. Saves the time that Python
    takes between operators, and the time that transformers takes to import; the operators are those of the `torch`
    backend, in float32.

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
        lowered = {tag: _weights(tag) for tag in sorted(tags | {"weights:float"}) if tag.startswith("weights:")}
        lowered |= {tag: _activations(tag) for tag in sorted(tags) if tag.startswith("activations:")}
        lowered |= {tag: _cache(tag) for tag in sorted(tags) if tag.startswith("kv:")}
        if not tags & {CAUSAL_LM, FEATURE_EXTRACTION}:
            task = next((tag for tag in sorted(tags) if tag.startswith("task:")), "task:unknown")
            lowered[task] = _impossible("only causal language models and encoders run on it")
        return lowered

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # The float weights that are traced and those of the archive, which is written from memory.
        return 2 * card.parameters * 4

    def compile(self, model: Model, directory: Path) -> None:
        from optkit_backends.torchscript.tracing import compile_decoder, compile_encoder

        if FEATURE_EXTRACTION in model.tags:
            compile_encoder(model.module, directory)
        else:
            compile_decoder(model.module, directory)

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession | TensorSession:
        from optkit_backends.torchscript.files import TensorFacts

        if (runtime / TensorFacts.FILE).exists():
            from optkit_backends.torchscript.tensors import TorchScriptTensorSession

            return TorchScriptTensorSession(runtime)
        from optkit_backends.torchscript.session import TorchScriptSession

        return TorchScriptSession(runtime, limits)


def _weights(tag: str) -> Lowering:
    if tag == "weights:float":
        return Lowering(LINEAR, native=True, tolerance=1e-5)
    if tag.startswith("weights:bnb-"):
        return _impossible("bitsandbytes' operators cannot be traced; use the torch backend")
    reason = "dequantized when compiled, so that the archive holds float32"
    return Lowering(LINEAR, native=False, tolerance=1e-5, reason=reason)


def _activations(tag: str) -> Lowering:
    match = ACTIVATIONS.fullmatch(tag)
    if match is None:
        return _impossible("it rounds activations to int8 or fp8, by token or by calibration")
    reason = "rounded in float32: quality is that of the artifact, speed is not"
    # Numbers next to a half round to the other neighbour where sums go in another order.
    return Lowering(f"inputs rounded to {match[1]} in float32", native=False, tolerance=0.02, reason=reason)


def _cache(tag: str) -> Lowering:
    if tag not in CACHES:
        return _impossible(
            "it keeps keys and values as float32 or int8; torch.jit cannot record how fp8 is read as bytes"
        )
    # As above.
    return Lowering("paged attention over int8 blocks, dequantized when read", native=True, tolerance=0.02)


def _impossible(reason: str) -> Lowering:
    return Lowering("", native=False, reason=reason)
