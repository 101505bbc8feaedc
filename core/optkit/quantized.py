"""The quantized layers that every quantizer makes and every backend lowers to its own kernel.

Vocabulary and rounding are those of compressed-tensors: a weight `w` is stored as `q = round(w / scale) + zero_point`,
clamped to `[-2**(bits-1), 2**(bits-1) - 1]`, and read back as `(q - zero_point) * scale`. Float weights of 8 bits are
E4M3 numbers, which have a scale and no zero point. Where activations are quantized too, a layer rounds its input in
the same way before the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.schemes import FP8_MAX, ActivationScheme, WeightScheme

__all__ = [
    "FP8_MAX",
    "ActivationScheme",
    "QuantizedConv2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "WeightScheme",
    "dequantize",
    "quantized_layers",
    "replace_module",
    "round_activations",
]


def dequantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The float weights that stored ones stand for.

    Args:
        weight: `[out, in]` int8 or float8_e4m3fn.
        scale: `[out, groups]` float; `in` is a multiple of `groups`.
        zero_point: `[out, groups]` int8, or None for symmetric weights.

    Returns:
        `[out, in]` in the dtype of `scale`.
    """
    grouped = weight.reshape(*scale.shape, -1).to(scale.dtype)
    if zero_point is not None:
        grouped = grouped - zero_point.to(scale.dtype).unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1)).reshape(weight.shape)


def round_activations(
    input: Tensor, scheme: ActivationScheme, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """An input as a layer with quantized activations sees it: rounded to 8 bits, and read back.

    Args:
        input: `[..., features]` float.
        scheme: how to round. Dynamic: a scale for each vector of features.
        scale: `[1]` float, for static schemes.
        zero_point: `[1]` int8, for static asymmetric schemes.

    Returns:
        The same shape and dtype.
    """
    if scheme.dynamic:
        scale, zero_point = _token_scale(input, scheme)
    assert scale is not None
    divided = input / scale
    if scheme.type == "float":
        return divided.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(input.dtype) * scale
    shift = 0 if zero_point is None else zero_point.to(input.dtype)
    return ((divided + shift).round().clamp(-128, 127) - shift) * scale


def _token_scale(input: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor | None]:
    largest, smallest = input.amax(-1, keepdim=True), input.amin(-1, keepdim=True)
    half = FP8_MAX if scheme.type == "float" else 127.5
    if scheme.symmetric:
        scale = torch.maximum(largest, -smallest) / half
    else:
        largest, smallest = largest.clamp(min=0), smallest.clamp(max=0)
        scale = (largest - smallest) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, None if scheme.symmetric else (-128 - smallest / scale).round().clamp(-128, 127)


class QuantizedLayer(nn.Module):
    """What quantized layers share. Its plain `forward` is the reference for every kernel.

    Attributes:
        weight: `[out, in]` int8, whatever the number of bits, or float8_e4m3fn. A convolution's is
            `[out, in / groups, height, width]`.
        scale: `[out, groups]` float32.
        zero_point: `[out, groups]` int8, or None.
        bias: `[out]` or None.
        scheme: how the weights are stored.
        activations: how the input is rounded, or None: it is not.
        input_scale: `[1]` float32 for static activations, else None.
        input_zero_point: `[1]` int8 for static asymmetric activations, else None.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        scheme: WeightScheme,
        activations: ActivationScheme | None = None,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.activations = scheme, activations
        features = weight[0].numel()
        groups = 1 if scheme.group_size is None else features // scheme.group_size
        for name, tensor in (("scale", scale), ("zero_point", zero_point)):
            if tensor is not None and tensor.shape != (len(weight), groups):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, the scheme needs {(len(weight), groups)}")
        if weight.dtype != scheme.dtype or (zero_point is None) != scheme.symmetric:
            raise ValueError(f"weights are {scheme.dtype}, and a zero point comes with asymmetric schemes only")
        static = activations is not None and not activations.dynamic
        shifted = static and activations is not None and not activations.symmetric
        if (input_scale is not None, input_zero_point is not None) != (static, shifted):
            raise ValueError("static activations come with a scale, and with a zero point where they are asymmetric")
        for name, tensor in (
            ("weight", weight),
            ("scale", scale),
            ("zero_point", zero_point),
            ("bias", bias),
            ("input_scale", input_scale),
            ("input_zero_point", input_zero_point),
        ):
            self.register_buffer(name, tensor)

    def dequantized(self) -> Tensor:
        """Float weights in the shape of `weight`."""
        return dequantize(self.weight.flatten(1), self.scale, self.zero_point).reshape(self.weight.shape)

    def rounded(self, input: Tensor) -> Tensor:
        """The input as the product gets it."""
        if self.activations is None:
            return input
        return round_activations(input, self.activations, self.input_scale, self.input_zero_point)


class QuantizedLinear(QuantizedLayer):
    """A linear layer with quantized weights, and perhaps quantized activations."""

    def __init__(self, weight: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(weight, *args, **kwargs)
        self.out_features, self.in_features = weight.shape

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.rounded(input), self.dequantized().to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, scheme={self.scheme}, activations={self.activations}"


class QuantizedConv2d(QuantizedLayer):
    """A convolution with quantized weights, one scale for each output channel, and perhaps quantized activations.

    Args:
        convolution: the float layer, whose stride, padding, dilation and groups it takes over.
        args: those of `QuantizedLayer`.
        kwargs: likewise. Dynamic activations are refused: a convolution has no tokens.

    Raises:
        RecipeError: by `forward`, where a model has cast the input to integers, as some do to the type of the weights.
    """

    def __init__(self, convolution: nn.Conv2d, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.scheme.group_size is not None or (self.activations is not None and self.activations.dynamic):
            raise ValueError("a convolution has a scale for each output channel, and static activations")
        if convolution.padding_mode != "zeros":
            raise ValueError(f"padding_mode {convolution.padding_mode!r} is not supported, only zeros")
        self.stride, self.padding = convolution.stride, convolution.padding
        self.dilation, self.groups = convolution.dilation, convolution.groups
        self.kernel_size = convolution.kernel_size
        self.out_channels, self.in_channels = len(self.weight), self.weight.shape[1] * self.groups

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            what = f"the model casts the input of a convolution to the type of its weights, {input.dtype}"
            remedy = "leave that convolution out (ignore), such as the patch embedding of a vision transformer"
            raise RecipeError(what, where=str(tuple(self.weight.shape)), remedy=remedy)
        weight = self.dequantized().to(input.dtype)
        rounded = self.rounded(input)
        return nn.functional.conv2d(rounded, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, scheme={self.scheme}, activations={self.activations}"


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every quantized layer of `module`, linear or convolution, with its path."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer))


def replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` in the place of the module at `path` below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new)
