"""What the kernels take: the structs of `csrc/shapes.h`, and weights packed as their comments say."""

from __future__ import annotations

import ctypes
import enum
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from optkit.quantized import QuantizedLinear

__all__ = ["CACHES", "TILE", "Instructions", "Layer", "Linear", "Model", "Step", "pack"]

TILE = 16
"""Output columns that are packed together, and tokens of a KV block."""
CACHES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""`Cache` in `csrc/shapes.h`, by the dtype of keys and values."""
_FLOAT32, _INT8, _INT4, _INT8_STEPS, _INT4_STEPS = range(5)
_KEPT, _SYMMETRIC, _SHIFTED, _FIXED = range(4)


class Instructions(enum.IntEnum):
    """What a processor has, each with all before it."""

    PORTABLE = 0
    AVX2 = 1
    AVX512_VNNI = 2

    @property
    def title(self) -> str:
        return ("portable", "AVX2", "AVX-512 VNNI")[self]


class Linear(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("in", c_int64),
        ("out", c_int64),
        ("group", c_int64),
        ("storage", c_int32),
        ("rounding", c_int32),
        ("input_scale", c_float),
        ("input_zero", c_float),
    )


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "attention_norm", "ffn_norm", "output_norm")),
        *((name, c_void_p) for name in ("query_norm", "key_norm", "cosines", "sines")),
        *((name, c_void_p) for name in ("keys", "values", "key_scale", "value_scale")),
        *((name, Linear) for name in ("query", "key", "value", "out", "gate", "up", "down")),
        ("window", c_int64),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("layers", POINTER(Layer)),
        ("head", Linear),
        *((name, c_int64) for name in ("layer_count", "hidden", "heads", "kv_heads", "head_dim", "rotary_dim")),
        *((name, c_int64) for name in ("ffn", "vocabulary", "blocks")),
        *((name, c_float) for name in ("eps", "embedding_factor", "attention_factor", "logit_cap")),
        ("gate", c_int32),
        ("cache", c_int32),
    )


class Step(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("tokens", "starts", "computed", "table", "kept", "logits")),
        ("seconds", POINTER(c_double)),
        *((name, c_int64) for name in ("token_count", "row_count", "width", "kept_count")),
    )


def pack(layer: nn.Module, keep: list[Tensor]) -> Linear:
    """A linear layer for the kernels.

    Args:
        layer: `torch.nn.Linear`, or `optkit.quantized.QuantizedLinear` of integers in groups of an even number of
            features.
        keep: gets the tensors that the struct points into, which must outlive it.
    """

    def pointer(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        keep.append(tensor.contiguous())
        return keep[-1].data_ptr()

    any_layer: Any = layer
    weight, bias = any_layer.weight.detach(), any_layer.bias
    out, features = weight.shape
    made = Linear(None, None, None, None, None, features, out, features, _FLOAT32, _KEPT, 1.0, 0.0)
    made.bias = pointer(None if bias is None else _columns(bias.detach().float()))
    if not isinstance(layer, QuantizedLinear):
        made.weight = pointer(_floats(weight.float()))
        return made
    made.group = features // layer.scale.shape[1]
    made.rounding, made.input_scale, made.input_zero = _rounding(layer)
    if layer.scheme.bits <= 4:
        made.storage = _INT4 if made.rounding == _KEPT else _INT4_STEPS
        packed = _pairs(weight) if made.rounding == _KEPT else _halves(_padded(weight, made.group, 8))
    elif made.rounding == _KEPT:
        made.storage, packed = _INT8, _by_step(weight, 2)
    else:
        padded = _padded(weight, made.group, 4)
        made.storage, packed = _INT8_STEPS, (_by_step(padded, 4).short() + 128).to(torch.uint8)
    made.weight, made.scale = pointer(packed), pointer(_by_column(layer.scale.float()))
    made.zero = pointer(None if layer.zero_point is None else _by_column(layer.zero_point.float()))
    if made.rounding != _SYMMETRIC and made.rounding != _KEPT:
        made.sums = pointer(_by_column(_sums(layer)))
    return made


def _rounding(layer: QuantizedLinear) -> tuple[int, float, float]:
    if layer.activations is None:
        return _KEPT, 1.0, 0.0
    if layer.activations.dynamic:
        return _SYMMETRIC if layer.activations.symmetric else _SHIFTED, 1.0, 0.0
    assert layer.input_scale is not None
    zero = 0.0 if layer.input_zero_point is None else layer.input_zero_point.item()
    return _FIXED, layer.input_scale.item(), zero


def _sums(layer: QuantizedLinear) -> Tensor:
    """Of each group's weights less their zero point: `[out, groups]` int32."""
    grouped = layer.weight.reshape(*layer.scale.shape, -1).int()
    if layer.zero_point is not None:
        grouped = grouped - layer.zero_point.int().unsqueeze(-1)
    return grouped.sum(-1, dtype=torch.int32)


def _tiles(weight: Tensor) -> Tensor:
    """`[out, in]` as `[tiles, TILE, in]`, with rows of zeros at its end."""
    rows = -len(weight) % TILE
    return nn.functional.pad(weight, (0, 0, 0, rows)).reshape(-1, TILE, weight.shape[1])


def _padded(weight: Tensor, group: int, step: int) -> Tensor:
    """`[out, in]` with zeros behind each group, to whole steps."""
    grouped = weight.reshape(len(weight), -1, group)
    return nn.functional.pad(grouped, (0, -group % step)).flatten(1)


def _floats(weight: Tensor) -> Tensor:
    return _tiles(weight).transpose(1, 2)


def _by_step(weight: Tensor, step: int) -> Tensor:
    """`[tiles, steps, TILE, step]`: a step is that many features."""
    tiles = _tiles(_padded(weight, weight.shape[1], step))
    return tiles.reshape(len(tiles), TILE, -1, step).transpose(1, 2)


def _pairs(weight: Tensor) -> Tensor:
    """`[tiles, in / 2, TILE]` of unsigned integers of 4 bits: two features in a byte."""
    steps = (_by_step(weight, 2) + 8).to(torch.uint8)
    return steps[..., 0] | (steps[..., 1] << 4)


def _halves(weight: Tensor) -> Tensor:
    """`[tiles, steps, TILE, 4]`: bytes with four features in their low halves, and the next four in the high ones."""
    steps = (_by_step(weight, 8) + 8).to(torch.uint8)
    return steps[..., :4] | (steps[..., 4:] << 4)


def _by_column(numbers: Tensor) -> Tensor:
    return _tiles(numbers).transpose(1, 2)


def _columns(bias: Tensor) -> Tensor:
    return nn.functional.pad(bias, (0, -len(bias) % TILE))
