"""Integer weights in the layout of ONNX Runtime's MatMulNBits and GatherBlockQuantized: the same integers, repacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from optkit.errors import RecipeError
from optkit.quantized import QuantizedLinear

__all__ = ["Blocks", "blocked"]

BITS = (2, 4, 8)
SMALLEST_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Blocks:
    """One weight matrix, `[out, in]`, in blocks of `block_size` input features."""

    data: npt.NDArray[np.uint8]
    """`[out, in * bits / 8]`, the lowest bits first; integers are stored plus `2**(bits - 1)`."""
    scales: npt.NDArray[np.float32]
    """`[out, blocks]`."""
    zero_points: npt.NDArray[np.uint8] | None
    """`[out, ceil(blocks * bits / 8)]`, packed as `data`; None stands for `2**(bits - 1)` everywhere."""
    bits: int
    block_size: int


def blocked(layers: Sequence[QuantizedLinear], largest: int, name: str) -> Blocks:
    """The weights of layers with one scheme, stacked along their outputs.

    A scale that covers more than one block is repeated, which changes no value.

    Args:
        layers: at least one; all with the same scheme and input features.
        largest: block size, a power of two from 16; smaller ones are taken where groups or shapes need it.
        name: of the module, for errors.

    Raises:
        RecipeError: the bits, group size or shape cannot be expressed.
    """
    scheme, features = layers[0].scheme, layers[0].in_features
    if scheme.bits not in BITS:
        raise RecipeError(
            "MatMulNBits of ONNX Runtime stores 2, 4 or 8 bits", where=name, found=scheme.bits, remedy="choose 4 or 8"
        )
    shared = scheme.group_size or features
    block_size = min(shared & -shared, largest)
    if block_size < SMALLEST_BLOCK:
        what = "input features" if scheme.group_size is None else "group size"
        raise RecipeError(f"MatMulNBits of ONNX Runtime needs {what} divisible by 16", where=name, found=shared)
    repeats = shared // block_size
    integers = torch.cat([layer.weight for layer in layers])
    scale = torch.cat([layer.scale for layer in layers]).float().repeat_interleave(repeats, dim=1)
    zero_points = None
    if not scheme.symmetric:
        zeros = torch.cat([layer.zero_point for layer in layers if layer.zero_point is not None])
        zero_points = _packed(zeros.repeat_interleave(repeats, dim=1), scheme.bits)
    return Blocks(_packed(integers, scheme.bits), scale.numpy(), zero_points, scheme.bits, block_size)


def _packed(integers: torch.Tensor, bits: int) -> npt.NDArray[np.uint8]:
    """`[rows, n]` int8 to `[rows, ceil(n * bits / 8)]`, the first of each byte in its lowest bits."""
    unsigned = integers.numpy().view(np.uint8) + np.uint8(1 << (bits - 1))  # wraps, as it should
    per_byte = 8 // bits
    padded = np.pad(unsigned, ((0, 0), (0, -unsigned.shape[1] % per_byte)))
    packed = np.zeros((padded.shape[0], padded.shape[1] // per_byte), np.uint8)
    for place in range(per_byte):
        packed |= padded[:, place::per_byte] << np.uint8(bits * place)
    return packed
