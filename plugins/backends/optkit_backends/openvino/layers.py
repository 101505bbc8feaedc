"""Quantized layers as operators of OpenVINO: what stands for them while a module is traced, and what becomes of it.

Tracing records two operators of our own, and the frontend of OpenVINO asks the functions here what they are.
Integer weights stay the very integers: a constant, less its zero points, times its scales, which the product after it
reads as it is. Activations with one scale are a FakeQuantize, the operator that OpenVINO's low-precision
transformations make integer products of.

Document: https://docs.openvino.ai/2026/documentation/openvino-ir-format/operation-sets.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import torch
from openvino import opset13 as opset
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.quantized import QuantizedConv2d, QuantizedLayer, dequantize, replace_module, round_activations
from optkit.schemes import ActivationScheme

__all__ = ["CONVERSIONS", "make_exportable"]

LEVELS = 256


def make_exportable(module: nn.Module) -> bool:
    """Put what can be exported in the place of every quantized layer of `module`, and say whether any rounds inputs.

    Raises:
        RecipeError: a layer has float8 weights or activations, which the frontend does not convert.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)]
    for name, layer in layers:
        for scheme in (layer.scheme, layer.activations):
            if scheme is not None and scheme.type == "float":
                raise RecipeError("the openvino backend rounds to integers only", where=name, found=scheme.tag)
        replace_module(module, name, _Exportable(layer))
    return any(layer.activations is not None for _, layer in layers)


class _Exportable(nn.Module):
    """A quantized layer, its weights and its rounding as one operator each."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(layer, QuantizedConv2d):
            # Models that pad by themselves ask for them.
            self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        # The operators take no None, and a zero point of 0 changes nothing.
        self.register_buffer("zero_point", _or_zeros(layer.zero_point, layer.scale))
        self.register_buffer(
            "shift", None if layer.input_scale is None else _or_zeros(layer.input_zero_point, layer.input_scale)
        )

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self.layer
        how = layer.activations
        if how is None or how.dynamic:
            rounded = layer.rounded(input)
        else:
            rounded = torch.ops.optkit_openvino.rounded(input, layer.input_scale, self.shift)
        weight = torch.ops.optkit_openvino.weight(layer.weight, layer.scale, self.zero_point, layer.scheme.bits)
        if isinstance(layer, QuantizedConv2d):
            options: Any = layer.stride, layer.padding, layer.dilation, layer.groups
            return nn.functional.conv2d(rounded, weight, layer.bias, *options)
        return nn.functional.linear(rounded, weight, layer.bias)


def _or_zeros(zero_point: Tensor | None, scale: Tensor) -> Tensor:
    return torch.zeros_like(scale, dtype=torch.int8) if zero_point is None else zero_point


@torch.library.custom_op("optkit_openvino::weight", mutates_args=())
def _weight(stored: Tensor, scale: Tensor, zero_point: Tensor, _bits: int) -> Tensor:
    """Float weights in the shape of the stored ones; see `optkit.quantized.dequantize`."""
    return dequantize(stored.flatten(1), scale, zero_point).reshape(stored.shape)


@_weight.register_fake
def _(stored: Tensor, scale: Tensor, _zero_point: Tensor, _bits: int) -> Tensor:
    return torch.empty_like(stored, dtype=scale.dtype)


@torch.library.custom_op("optkit_openvino::rounded", mutates_args=())
def _rounded(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The input of a layer of static int8 activations; see `optkit.quantized.round_activations`."""
    return round_activations(input, ActivationScheme(dynamic=False, symmetric=False), scale, zero_point)


@_rounded.register_fake
def _(input: Tensor, _scale: Tensor, _zero_point: Tensor) -> Tensor:
    return torch.empty_like(input)


def _converted_weight(context: Any) -> list[Any]:
    stored, scale, zero_point = (context.get_input(place).get_node() for place in range(3))
    bits: int = context.get_values_from_const_input(3)
    shape, groups = list(stored.data.shape), scale.data.shape[1]
    # Each group of input features as an axis of its own, which its scale and zero point are spread over.
    grouped = shape if groups == 1 else [shape[0], groups, shape[1] // groups]
    spread = [shape[0], groups, *[1] * (len(grouped) - 2)]
    weight = _floats(stored.data.reshape(grouped), bits)
    if zero_point.data.any():
        weight = opset.subtract(weight, _floats(zero_point.data.reshape(spread), bits))
    weight = opset.multiply(weight, openvino.op.Constant(scale.data.reshape(spread)))
    if groups != 1:
        weight = opset.reshape(weight, openvino.op.Constant(np.array(shape)), special_zero=False)
    return list(weight.outputs())


def _floats(integers: npt.NDArray[np.int8], bits: int) -> Any:
    """Stored integers, read as floats; in half a byte each where they fit."""
    if bits > 4:
        return opset.convert(openvino.op.Constant(integers), "f32")
    pairs = np.pad(integers.reshape(-1), (0, integers.size % 2)).view(np.uint8)
    packed = (pairs[::2] & 15) | (pairs[1::2] << 4)
    # The tensor only borrows the numbers, so the constant copies them.
    tensor = openvino.Tensor(packed, openvino.Shape(list(integers.shape)), openvino.Type.i4)
    return opset.convert(openvino.op.Constant(tensor, shared_memory=False), "f32")


def _converted_rounding(context: Any) -> list[Any]:
    scale, shift = (context.get_input(place).get_node().data.astype(np.float64).item() for place in (1, 2))
    ends = [openvino.op.Constant(np.array((end - shift) * scale, np.float32)) for end in (-128, 127)]
    return list(opset.fake_quantize(context.get_input(0), *ends, *ends, levels=LEVELS).outputs())


CONVERSIONS: dict[str, Callable[[Any], list[Any]]] = {
    "optkit_openvino::weight": _converted_weight,
    "optkit_openvino::rounded": _converted_rounding,
}
"""By operator, what the frontend calls with its inputs and gets outputs from."""
