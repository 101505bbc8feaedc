"""Quantized layers as the float layers that they stand for."""

from __future__ import annotations

from torch import nn

from optkit.quantized import quantized_layers, replace_module

__all__ = ["make_dense"]


def make_dense(module: nn.Module) -> None:
    """Put a linear layer with dequantized weights in the place of every quantized one; each is freed as it goes."""
    for name, layer in list(quantized_layers(module)):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias, requires_grad=False)
        replace_module(module, name, dense)
