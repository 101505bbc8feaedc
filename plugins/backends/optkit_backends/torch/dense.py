"""Quantized layers as the float layers that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optkit.quantized import QuantizedConv2d, QuantizedLayer, quantized_layers, replace_module, round_activations

__all__ = ["make_dense"]


class _Rounded(nn.Module):
    """A layer behind the rounding of its input, which it does as the quantized layer that it stands for."""

    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def round_as(self, layer: QuantizedLayer) -> None:
        assert layer.activations is not None
        self._activations = layer.activations
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("input_zero_point", layer.input_zero_point)

    def rounded(self, input: Tensor) -> Tensor:
        return round_activations(input, self._activations, self.input_scale, self.input_zero_point)


class RoundedLinear(_Rounded, nn.Linear):
    """A linear layer with the float weights of a quantized one, that rounds its input as that one does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.rounded(input))


class RoundedConv2d(_Rounded, nn.Conv2d):
    """Likewise a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.rounded(input))


def make_dense(module: nn.Module) -> None:
    """Put a layer with dequantized weights in the place of every quantized one; each is freed as it goes."""
    for name, layer in list(quantized_layers(module)):
        dense = _dense(layer)
        if isinstance(dense, _Rounded):
            dense.round_as(layer)
        dense.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias, requires_grad=False)
        replace_module(module, name, dense)


def _dense(layer: QuantizedLayer) -> nn.Linear | nn.Conv2d:
    """A layer of its shape, without weights."""
    bias, rounds = layer.bias is not None, layer.activations is not None
    with torch.device("meta"):
        if isinstance(layer, QuantizedConv2d):
            out_channels, in_channels, *kernel = layer.weight.shape
            convolution: Any = RoundedConv2d if rounds else nn.Conv2d
            places = layer.stride, layer.padding, layer.dilation, layer.groups
            made: nn.Conv2d = convolution(in_channels * layer.groups, out_channels, tuple(kernel), *places, bias=bias)
            return made
        out_features, in_features = layer.weight.shape
        return (RoundedLinear if rounds else nn.Linear)(in_features, out_features, bias=bias)
