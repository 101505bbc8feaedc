"""Integer weights as blocks of GGUF: the very integers, and scales in float16.

A block holds 32 input features of one output channel. Its bytes are those of `ggml-common.h`, little-endian:

| type | bytes | fields | a weight is |
|---|---|---|---|
| Q8_0 | 34 | scale, 32 int8 | `q * scale` |
| Q4_0 | 18 | scale, 16 bytes | `(code - 8) * scale` |
| Q4_1 | 20 | scale, minimum, 16 bytes | `code * scale + minimum` |

A byte of 4-bit codes has feature `i` in its low half and feature `i + 16` in its high one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from optkit.errors import RecipeError

__all__ = ["BLOCK", "BlockType", "blocks", "stored_as"]

BLOCK = 32
BlockType = Literal["Q8_0", "Q4_0", "Q4_1"]
_OFFSET = 8  # of a 4-bit code from the integer that it stands for


def stored_as(bits: int, symmetric: bool) -> BlockType | None:
    """The smallest blocks that hold integers of so many bits as they are; None where there are none."""
    if bits <= 4:
        return "Q4_0" if symmetric else "Q4_1"
    return "Q8_0" if symmetric else None


def blocks(
    kind: BlockType,
    integers: npt.NDArray[np.int8],
    scale: npt.NDArray[np.float32],
    zero_point: npt.NDArray[np.int8] | None,
    where: str,
) -> npt.NDArray[np.uint8]:
    """The bytes of a matrix. Nothing but the scales is rounded: by 2^-11 of themselves at most, or by 2^-25 where they
    are less than 2^-14.

    Args:
        kind: that of `stored_as`.
        integers: `[out, in]`, as `QuantizedLinear` stores them.
        scale: `[out, groups]`; several blocks may share one.
        zero_point: `[out, groups]`, for Q4_1 only.
        where: the layer, for errors.

    Returns:
        `[out, bytes]`.

    Raises:
        RecipeError: a group is not made of whole blocks, or a scale is too large for float16.
    """
    rows, features = integers.shape
    size = features // scale.shape[1]
    if size % BLOCK:
        raise RecipeError(
            f"blocks of GGUF hold {BLOCK} input features, and none may reach into two groups",
            where=where,
            found=f"groups of {size}",
            remedy=f"set group_size to a multiple of {BLOCK}, or leave the layer out",
        )
    by_block = scale.repeat(size // BLOCK, axis=1)
    with np.errstate(over="ignore"):  # looked for below
        halves = by_block.astype("<f2")
        fields = [halves]
        if kind == "Q4_1":
            assert zero_point is not None
            lowest = -(zero_point.astype(np.float32) + _OFFSET).repeat(size // BLOCK, axis=1)
            # Of the rounded scale, so that zero stays next to zero.
            fields.append((lowest * halves.astype(np.float32)).astype("<f2"))
    if not all(np.isfinite(field).all() for field in fields):
        raise RecipeError(
            "a scale is more than float16 can hold, which GGUF stores",
            where=where,
            found=float(scale.max()),
            remedy="leave the layer out, or choose another backend",
        )
    grouped = integers.reshape(rows, -1, BLOCK)
    if kind != "Q8_0":
        codes = (grouped + _OFFSET).astype(np.uint8)
        grouped = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
    parts = [*(field[..., None].view(np.uint8) for field in fields), grouped.view(np.uint8)]
    return np.concatenate(parts, axis=2).reshape(rows, -1)
