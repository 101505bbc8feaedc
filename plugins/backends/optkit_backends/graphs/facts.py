"""What a session must know of a compiled graph, written beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from optkit.errors import RecipeError
from optkit.steps import Limits
from optkit_backends.graphs.tensors import Described
from optkit_backends.graphs.timing import Product
from optkit_backends.recorded import Recorded
from optkit_backends.torch.pool import LayerShape

__all__ = ["DecoderFacts", "TensorFacts"]


@dataclass(frozen=True, slots=True)
class DecoderFacts(Recorded):
    """Of a `DecoderGraph`."""

    FILE: ClassVar[str] = "session.json"

    layers: list[tuple[int, int, int, str]]
    """Heads, numbers of a key, numbers of a value, and their dtype, of what each layer keeps."""
    windows: list[int | None]
    """The different windows of its layers, in the order of the masks."""
    products: list[Product]
    """Linear layers and convolutions, in the order in which they run."""
    vocab_size: int
    longest: int | None
    """Tokens beyond which rotary angles would not be those of the graph."""
    torch: str
    """The version that compiled it."""

    @property
    def shapes(self) -> list[LayerShape]:
        """What each layer keeps."""
        return [LayerShape(heads, key, value, getattr(torch, dtype)) for heads, key, value, dtype in self.layers]

    def check(self, limits: Limits) -> None:
        """Check that sequences are no longer than the graph holds for.

        Raises:
            RecipeError: they are.
        """
        if self.longest is not None and limits.max_length > self.longest:
            raise RecipeError(
                f"the compiled rotary angles hold for {self.longest} tokens",
                found=limits.max_length,
                remedy=f"set max_length to {self.longest} or less",
            )


@dataclass(frozen=True, slots=True)
class TensorFacts(Recorded):
    """Of a `TensorGraph`."""

    FILE: ClassVar[str] = "tensors.json"

    inputs: Described
    """By name, dtype and shape."""
    outputs: Described
    """Likewise, in the order in which they come."""
    products: list[Product]
    """Linear layers and convolutions, in the order in which they run."""
    torch: str
    """The version that compiled it."""
