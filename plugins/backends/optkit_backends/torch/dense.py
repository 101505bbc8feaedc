"""Quantized layers as the float layers that they stand for."""

from __future__ import annotations

from torch import Tensor, nn

from optkit.quantized import QuantizedLinear, quantized_layers, replace_module, round_activations

__all__ = ["make_dense"]


class RoundedLinear(nn.Linear):
    """A linear layer with the float weights of a quantized one, that rounds its input as that one does."""

    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        assert layer.activations is not None
        self._activations = layer.activations
        self.register_buffer("input_scale", layer.input_scale)
        self.register_buffer("input_zero_point", layer.input_zero_point)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(round_activations(input, self._activations, self.input_scale, self.input_zero_point))


def make_dense(module: nn.Module) -> None:
    """Put a linear layer with dequantized weights in the place of every quantized one; each is freed as it goes."""
    for name, layer in list(quantized_layers(module)):
        dense: nn.Linear
        if layer.activations is None:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        else:
            dense = RoundedLinear(layer)
        dense.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias, requires_grad=False)
        replace_module(module, name, dense)
