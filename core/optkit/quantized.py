"""The quantized linear layer that every quantizer makes and every backend lowers to its own kernel.

Vocabulary and rounding are those of compressed-tensors: a weight `w` is stored as `q = round(w / scale) + zero_point`,
clamped to `[-2**(bits-1), 2**(bits-1) - 1]`, and read back as `(q - zero_point) * scale`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["QuantizedLinear", "WeightScheme", "dequantize", "quantized_layers", "replace_module"]

Granularity = Literal["channel", "group"]


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of one layer are stored."""

    bits: int
    """2 to 8."""
    group_size: int | None
    """Input features that share a scale; None: one scale for each output channel."""
    symmetric: bool

    @property
    def granularity(self) -> Granularity:
        return "channel" if self.group_size is None else "group"

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest stored integer."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @property
    def tag(self) -> str:
        """The `weights:*` tag of this format, for example `weights:int4-group`; asymmetric ones end in `-asym`."""
        return f"weights:int{self.bits}-{self.granularity}" + ("" if self.symmetric else "-asym")


def dequantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The float weights that integers stand for.

    Args:
        weight: `[out, in]` int8.
        scale: `[out, groups]` float; `in` is a multiple of `groups`.
        zero_point: `[out, groups]` int8, or None for symmetric weights.

    Returns:
        `[out, in]` in the dtype of `scale`.
    """
    grouped = weight.reshape(*scale.shape, -1).to(scale.dtype)
    if zero_point is not None:
        grouped = grouped - zero_point.to(scale.dtype).unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).reshape(weight.shape)


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights. Its plain `forward` is the reference for every kernel.

    Attributes:
        weight: `[out_features, in_features]` int8, whatever the number of bits.
        scale: `[out_features, groups]` float32.
        zero_point: `[out_features, groups]` int8, or None.
        bias: `[out_features]` or None.
        scheme: how the weights are stored.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, scheme: WeightScheme
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = weight.shape
        groups = 1 if scheme.group_size is None else self.in_features // scheme.group_size
        for name, tensor in (("scale", scale), ("zero_point", zero_point)):
            if tensor is not None and tensor.shape != (self.out_features, groups):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, the scheme needs {(self.out_features, groups)}")
        if weight.dtype != torch.int8 or (zero_point is None) != scheme.symmetric:
            raise ValueError("weights are int8, and a zero point comes with asymmetric schemes only")
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", bias)

    def dequantized(self) -> Tensor:
        """`[out_features, in_features]` float weights."""
        return dequantize(self.weight, self.scale, self.zero_point)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dequantized().to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Every quantized layer of `module` with its path."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear))


def replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` in the place of the module at `path` below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
