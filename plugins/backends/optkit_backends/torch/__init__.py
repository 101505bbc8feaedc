"""The `torch` backend: transformers' own eager modules, the reference that every other runtime is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optkit.backends import Backend, Lowering, TensorSession, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit.weights import CAUSAL_LM, FEATURE_EXTRACTION, holds_encoder

__all__ = ["Torch"]


class Torch(Backend):
    """Eager PyTorch in float32. Nothing is compiled; integer weights are dequantized when the session opens.

    The reference for quality and for other backends' parity. A quantized model takes the memory of the float one here,
    and only its files are smaller. Steps are packed, so layers see no padding, and the KV cache is paged in blocks of
    16 tokens, so it runs any batching strategy. It takes every causal language model whose attention transformers lets
    others replace, with a sliding window or without; others are refused when they are opened. Encoders run in padded
    batches.
    """

    def unavailable(self) -> str | None:
        return None  # torch is a dependency of optkit itself

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        lowered = {"weights:float": Lowering("torch.nn.functional.linear in float32", native=True, tolerance=1e-5)}
        for tag in sorted(tag for tag in tags if tag.startswith("weights:") and tag != "weights:float"):
            lowered[tag] = Lowering(
                "torch.nn.functional.linear in float32",
                native=False,
                tolerance=1e-5,
                reason="dequantized when opened, so only files shrink",
            )
        if not tags & {CAUSAL_LM, FEATURE_EXTRACTION}:
            task = next((tag for tag in sorted(tags) if tag.startswith("task:")), "task:unknown")
            lowered[task] = Lowering("", native=False, reason="only causal language models and encoders run on it")
        return lowered

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # Integers are freed layer by layer as floats take their place.
        return card.parameters * 4

    def compile(self, model: Model, directory: Path) -> None:
        """Write nothing: the `weights` folder is all that the session needs."""

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession | TensorSession:
        if holds_encoder(weights):
            from optkit_backends.torch.tensors import TorchTensorSession

            return TorchTensorSession(weights)
        from optkit_backends.torch.session import TorchSession

        return TorchSession(weights, limits)
