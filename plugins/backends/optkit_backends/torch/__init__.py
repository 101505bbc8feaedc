"""The `torch` backend: transformers' own eager modules, the reference that every other runtime is judged by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from optkit import hardware
from optkit.backends import Backend, Lowering, TensorSession, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit.weights import FEATURE_EXTRACTION, IMAGE_CLASSIFICATION, folder_task
from optkit_backends.tasks import other_task

__all__ = ["Torch"]

ACTIVATIONS = re.compile(r"activations:(int8|fp8)-(dynamic|static)(-asym)?")
CACHES = re.compile(r"kv:((int8|fp8)-(head|tensor)|bfloat16)")


class Torch(Backend):
    """PyTorch's own kernels in float32, or optkit's for decoders. The KV cache is paged, for any batching strategy.

    With `kernels: eager` nothing is compiled, and integer weights are dequantized when the session opens. It is the
    reference for quality and for other backends' parity. A quantized model takes the memory of the float one, and only
    its files are smaller. Where its activations are quantized too they are rounded, in float32, which makes it slower
    and not faster. Steps are packed, so layers see no padding. It takes every causal language model whose attention
    transformers lets others replace, with a sliding window or without; others are refused when they are opened.
    Encoders run in padded batches, image classifiers in batches.

    With `kernels: native` one call into compiled code runs a whole step of a decoder of the Llama type (Llama, Mistral,
    Qwen2, Qwen3, Gemma, Gemma 3): integer weights stay as they are stored, and with int8 activations they are
    multiplied as integers, exactly. A row's logits are the same bits whatever else is in its step. The kernels are
    built once, which takes a C++ compiler and half a minute.
    """

    kernels: Literal["eager", "native"] = "eager"
    """Whose kernels run decoders."""
    threads: int | None = Field(default=None, ge=1)
    """Of `native`: that share a step; by default as many as there are cores for this process."""

    def unavailable(self) -> str | None:
        if self.kernels == "eager":
            return None  # torch is a dependency of optkit itself
        from optkit_backends.torch.native.building import missing

        return missing()

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        if self.kernels == "native":
            from optkit_backends.torch.native.lowering import lowering

            return lowering(tags)
        lowered = {"weights:float": Lowering("torch.nn.functional.linear in float32", native=True, tolerance=1e-5)}
        for tag in sorted(tag for tag in tags if tag.startswith("weights:bnb-")):
            lowered[tag] = _bitsandbytes(tag)
        for tag in sorted(tag for tag in tags if tag.startswith("weights:") and tag not in lowered):
            lowered[tag] = Lowering(
                "torch.nn.functional.linear in float32",
                native=False,
                tolerance=1e-5,
                reason="dequantized when opened, so only files shrink",
            )
        lowered |= {tag: _activations(tag) for tag in sorted(tags) if tag.startswith("activations:")}
        lowered |= {tag: _cache(tag) for tag in sorted(tags) if tag.startswith("kv:")}
        return lowered | other_task(tags)

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # Integers are freed layer by layer as floats take their place.
        return card.parameters * 4

    def compile(self, model: Model, directory: Path) -> None:
        """Write nothing: the `weights` folder is all that the session needs."""

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession | TensorSession:
        task = folder_task(weights)
        if task == FEATURE_EXTRACTION:
            from optkit_backends.torch.tensors import TorchTensorSession

            return TorchTensorSession(weights)
        if task == IMAGE_CLASSIFICATION:
            from optkit_backends.torch.tensors import TorchImageSession

            return TorchImageSession(weights)
        if self.kernels == "native":
            from optkit_backends.torch.native.session import NativeSession

            return NativeSession(weights, limits, threads=self.threads or hardware.usable_cores())
        from optkit_backends.torch.session import TorchSession

        return TorchSession(weights, limits)


def _activations(tag: str) -> Lowering:
    match = ACTIVATIONS.fullmatch(tag)
    if match is None:
        return Lowering("", native=False, reason="it rounds activations to int8 or fp8, by token or by calibration")
    reason = "rounded in float32: quality is that of the artifact, speed is not"
    # Numbers next to a half round to the other neighbour where sums go in another order, and each layer multiplies
    # what the ones before tipped. MiniLM shows 0.07 in padded batches; twice that.
    return Lowering(f"inputs rounded to {match[1]} in float32", native=False, tolerance=0.15, reason=reason)


def _cache(tag: str) -> Lowering:
    match = CACHES.fullmatch(tag)
    if match is None:
        return Lowering("", native=False, reason="it keeps keys and values as float32, bfloat16, int8 or fp8")
    # Numbers next to a half round to the other neighbour where sums go in another order: 0.006 on SmolLM2-135M.
    if match[2] is None:
        return Lowering("paged attention over bfloat16 blocks, widened when read", native=True, tolerance=0.02)
    kernel = f"paged attention over {match[2]} blocks, dequantized when read"
    return Lowering(kernel, native=True, tolerance=0.02)


def _bitsandbytes(tag: str) -> Lowering:
    if tag == "weights:bnb-int8":
        reason = "a feature with an outlier is computed in float for all rows of a step, so rows depend on each other"
        return Lowering("bitsandbytes.nn.Linear8bitLt", native=True, tolerance=0.05, reason=reason)
    return Lowering("bitsandbytes.nn.Linear4bit", native=True, tolerance=1e-3)
