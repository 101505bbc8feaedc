"""Quantized layers as operators of ONNX, for `torch.onnx.export`: nothing here runs in torch.

Layers of int8 activations are integer operators from the start. QuantizeLinear and DequantizeLinear around float
products would leave it to passes of ONNX Runtime 1.32 to make them so, which miss products of two axes with a bias, and
convolutions whose output nobody rounds. Operators: its `docs/ContribOperators.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from optkit.errors import RecipeError
from optkit.quantized import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from optkit.schemes import WeightScheme
from optkit_backends.onnxruntime.builder import MICROSOFT
from optkit_backends.onnxruntime.convolutions import UNSETTLED
from optkit_backends.onnxruntime.integers import blocked

__all__ = ["exportable", "node", "trimmed"]

NONE = torch.zeros((), dtype=torch.int8)
# Where a processor has no VNNI, the kernels for unsigned by signed add two products in 16 bits. 255 * 64 * 2 fits.
SIGNED_BITS = 7
# Where a token is all zeros.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def exportable(layer: QuantizedLayer, name: str, *, accuracy_level: int, block_size: int) -> nn.Module:
    """What takes the place of a quantized layer while the model is exported.

    Args:
        layer: linear or convolution.
        name: its path, for errors.
        accuracy_level: of MatMulNBits, for weights alone.
        block_size: likewise.

    Raises:
        RecipeError: no kernel of ONNX Runtime computes what the layer does.
    """
    if layer.scheme.type == "float":
        raise RecipeError("the onnxruntime backend has no kernel for float8 weights", where=name)
    if layer.activations is None:
        if isinstance(layer, QuantizedLinear):
            if accuracy_level == 4 and _by_token(layer.scheme):
                return _Dynamic(layer)
            return _Blockwise(layer, name, accuracy_level, block_size)
        raise RecipeError(
            "ONNX Runtime has no kernel for a convolution whose weights alone are integers",
            where=name,
            remedy="quantize its activations too, or leave it in floating point",
        )
    if layer.activations.type == "float" or (layer.activations.dynamic and not layer.activations.symmetric):
        raise RecipeError(
            "integer products of ONNX Runtime need int8 activations with a scale for each token, or one zero point",
            where=name,
            found=layer.activations.tag,
        )
    if layer.scheme.group_size is not None:
        raise RecipeError(
            "integer products of ONNX Runtime need one scale for each output channel",
            where=name,
            found=f"groups of {layer.scheme.group_size}",
        )
    if isinstance(layer, QuantizedLinear):
        return _Dynamic(layer) if layer.activations.dynamic else _Product(layer)
    assert isinstance(layer, QuantizedConv2d)
    if layer.zero_point is not None:
        raise RecipeError("QLinearConv of ONNX Runtime needs symmetric weights", where=name, found=layer.scheme.tag)
    return _Convolution(layer)


def _by_token(scheme: WeightScheme) -> bool:
    """Whether weights alone can be multiplied with activations that are rounded token by token."""
    return scheme.group_size is None and scheme.bits == 8


class _Blockwise(nn.Module):
    """Integer weights alone: MatMulNBits."""

    data: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: QuantizedLinear, name: str, accuracy_level: int, block_size: int) -> None:
        super().__init__()
        blocks = blocked([layer], block_size, name)
        data = blocks.data.reshape(*blocks.scales.shape, -1)
        zero_points = None if blocks.zero_points is None else torch.from_numpy(blocks.zero_points)
        self.register_buffer("data", torch.from_numpy(data))
        self.register_buffer("scales", torch.from_numpy(np.ascontiguousarray(blocks.scales)))
        self.register_buffer("zero_points", zero_points)
        self.register_buffer("bias", layer.bias)
        self.sizes = {
            "K": layer.in_features,
            "N": layer.out_features,
            "bits": blocks.bits,
            "block_size": blocks.block_size,
            "accuracy_level": accuracy_level,
        }

    def forward(self, input: Tensor) -> Tensor:
        operands = [input, self.data, self.scales, *trimmed([self.zero_points, None, self.bias])]
        shape = [*input.shape[:-1], self.sizes["N"]]
        return node(f"{MICROSOFT}::MatMulNBits", operands, input.dtype, shape, self.sizes)


class _Stored(nn.Module):
    """A layer of int8 activations: its weights as integer products read them.

    Activations are stored unsigned, and so are weights of 8 bits and their zero points; the numbers are the same. Where
    a processor has no VNNI, the kernels of ONNX Runtime for unsigned by signed saturate at 16 bits, which no option but
    a pass over the graph prevents, and that pass fails where two layers share weights. Weights of fewer bits cannot
    saturate: they stay signed, which is faster there. Where there is VNNI all are signed once they are loaded: see
    `signs`.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        zero_point = NONE if layer.zero_point is None else layer.zero_point[:, 0]
        signed = layer.scheme.bits <= SIGNED_BITS
        self.register_buffer("weight", layer.weight if signed else _unsigned(layer.weight))
        self.register_buffer("scale", layer.scale[:, 0].float())
        self.register_buffer("zero_point", zero_point if signed else _unsigned(zero_point))
        self.register_buffer("bias", layer.bias)


class _Static(_Stored):
    """One of static int8 activations."""

    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__(layer)
        assert layer.input_scale is not None
        shift = layer.input_zero_point
        self.register_buffer("input_scale", layer.input_scale.float().reshape(()))
        self.register_buffer("input_zero_point", _unsigned(NONE if shift is None else shift.reshape(())))

    def stored(self, input: Tensor) -> Tensor:
        operands = [input, self.input_scale, self.input_zero_point]
        return node("QuantizeLinear", operands, torch.uint8, input.shape)


class _Product(_Static):
    """A linear layer of static int8 activations: MatMulIntegerToFloat."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.weight = self.weight.t().contiguous()

    def forward(self, input: Tensor) -> Tensor:
        grids = [self.input_scale, self.scale, self.input_zero_point, self.zero_point]
        operands = [self.stored(input), self.weight, *grids, *trimmed([self.bias])]
        shape = [*input.shape[:-1], self.weight.shape[1]]
        return node(f"{MICROSOFT}::MatMulIntegerToFloat", operands, input.dtype, shape)


class _Dynamic(_Stored):
    """A linear layer whose input is rounded by the scale of each token: MatMulIntegerToFloat on numbers around 0.

    The kernel takes one scale for all activations, so the tokens' own are multiplied in afterwards, and only then comes
    the bias, which ONNX Runtime adds in the activation or norm that follows.
    """

    one: Tensor
    centre: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__(layer)
        self.weight = self.weight.t().contiguous()
        self.register_buffer("one", torch.ones(()))
        self.register_buffer("centre", _unsigned(NONE))

    def forward(self, input: Tensor) -> Tensor:
        largest = torch.maximum(input.amax(-1, keepdim=True), -input.amin(-1, keepdim=True))
        scale = (largest / 127.5).clamp(min=SMALLEST_SCALE)
        stored = node("QuantizeLinear", [input / scale, self.one, self.centre], torch.uint8, input.shape)
        operands = [stored, self.weight, self.one, self.scale, self.centre, self.zero_point]
        shape = [*input.shape[:-1], self.weight.shape[1]]
        product = node(f"{MICROSOFT}::MatMulIntegerToFloat", operands, input.dtype, shape) * scale
        return product if self.bias is None else product + self.bias


class _Convolution(_Static):
    """A convolution of static int8 activations: a node that `convolutions.settle` makes an operator of."""

    def __init__(self, layer: QuantizedConv2d) -> None:
        super().__init__(layer)
        kernel = layer.weight.shape[2:]
        self.dilation, self.stride, self.kernel_size = _pair(layer.dilation), _pair(layer.stride), kernel
        if layer.padding == "same":
            missing = [dilation * (size - 1) for dilation, size in zip(self.dilation, kernel, strict=True)]
            self.pads = [*(size // 2 for size in missing), *(size - size // 2 for size in missing)]
        else:
            self.pads = [*_pair(0 if layer.padding == "valid" else layer.padding)] * 2
        self.groups = layer.groups

    def forward(self, input: Tensor) -> Tensor:
        operands = [self.stored(input), self.input_scale, self.input_zero_point]
        operands += [self.weight, self.scale, self.zero_point]
        shape = [input.shape[0], len(self.weight), *map(self._size, range(2), input.shape[2:])]
        attributes = {
            "dilations": [*self.dilation],
            "group": self.groups,
            "kernel_shape": [*self.kernel_size],
            "pads": self.pads,
            "strides": [*self.stride],
        }
        return node(f"{UNSETTLED}::Conv", [*operands, *trimmed([self.bias])], input.dtype, shape, attributes)

    def _size(self, axis: int, size: Any) -> Any:
        covered = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
        return (size + self.pads[axis] + self.pads[axis + 2] - covered) // self.stride[axis] + 1


def _pair(value: int | tuple[int, ...] | str) -> tuple[int, ...]:
    assert not isinstance(value, str)
    return (value, value) if isinstance(value, int) else value


def _unsigned(stored: Tensor) -> Tensor:
    return (stored.short() + 128).to(torch.uint8)


def trimmed(operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Without what is absent at the end."""
    given = [index for index, operand in enumerate(operands) if operand is not None]
    return list(operands[: given[-1] + 1]) if given else []


def node(
    operator: str,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    shape: Sequence[Any],
    attributes: dict[str, Any] | None = None,
) -> Tensor:
    """An operator of ONNX in the place of a computation: one output of a dtype and shape."""
    return symbolic(operator, inputs, attributes, dtype=dtype, shape=shape)
