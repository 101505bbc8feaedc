"""Low-rank changes of frozen layers (Hu et al., LoRA, arXiv:2106.09685), also of layers on a mask.

Not those of the library peft, whose LoRA knows no masks: what it trains on a masked layer is another model than the one
that is left when the mask is applied to the merged weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from optkit.errors import OptkitError
from optkit.quantized import replace_module

__all__ = ["Adapted", "adapt", "merge"]


class Adapted(nn.Module):
    """A layer whose weight is the frozen one plus a product of two thin matrices.

    Args:
        layer: linear or a convolution; its weight, flattened to `[out, rest]`, is left alone.
        rank: of the change, which is 0 at first.
        generator: of the first numbers.
        masked: weights that are 0 stay 0.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, generator: torch.Generator, *, masked: bool) -> None:
        super().__init__()
        out, rest = layer.weight.flatten(1).shape
        bound = 1 / math.sqrt(rest)
        first = torch.rand(rank, rest, generator=generator) * (2 * bound) - bound
        self.layer = layer
        self.first = nn.Parameter(first.to(layer.weight))
        self.second = nn.Parameter(torch.zeros(out, rank).to(layer.weight))
        self._mask = layer.weight != 0 if masked else None

    @property
    def weight(self) -> Tensor:
        """The changed weight, in the layer's own shape."""
        change = (self.second @ self.first).view_as(self.layer.weight)
        return self.layer.weight + (change if self._mask is None else change * self._mask)

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, input: Tensor) -> Tensor:
        if self._mask is None and isinstance(self.layer, nn.Linear):
            # Without the gradient of the whole weight: a quarter less work.
            output: Tensor = self.layer(input)
            return output + functional.linear(functional.linear(input, self.first), self.second)
        changed: Tensor = functional_call(self.layer, {"weight": self.weight}, (input,))
        return changed


def adapt(module: nn.Module, rank: int, generator: torch.Generator, *, masked: bool) -> dict[str, nn.Parameter]:
    """Put an `Adapted` in the place of each linear layer and convolution but the output head, in place.

    Returns:
        What is to be trained, by name.

    Raises:
        OptkitError: the model has no such layer.
    """
    find_head: Any = getattr(module, "get_output_embeddings", lambda: None)
    head = find_head()
    layers: dict[str, Any] = {
        # No subclass: those of nn.MultiheadAttention are never called.
        name: part
        for name, part in module.named_modules()
        if type(part) in (nn.Linear, nn.Conv2d) and part is not head
    }
    if not layers:
        raise OptkitError("has no linear layer that LoRA could change", where="the model", remedy="use method: full")
    trained: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        adapted = Adapted(layer, rank, generator, masked=masked)
        replace_module(module, name, adapted)
        trained |= {f"{name}.first": adapted.first, f"{name}.second": adapted.second}
    return trained


def merge(module: nn.Module) -> None:
    """Put ordinary layers with the changed weights in the place of all `Adapted`, in place."""
    adapted = {name: part for name, part in module.named_modules() if isinstance(part, Adapted)}
    for name, part in adapted.items():
        part.layer.weight.data = part.weight.detach()
        replace_module(module, name, part.layer)
