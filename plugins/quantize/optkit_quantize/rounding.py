"""Rounding a weight matrix to a stored format, the plain way that every quantizer ends with or starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from optkit.errors import OptkitError

if TYPE_CHECKING:
    from torch import Tensor

    from optkit.quantized import WeightScheme

__all__ = ["grouped", "least_wrong", "ranges", "round_weight", "round_with"]


def round_weight(weight: Tensor, scheme: WeightScheme, *, name: str = "weight") -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight matrix to nearest, with the range of each group as its scale.

    Args:
        weight: `[out, in]` float; every group of `scheme` is rounded on its own.
        scheme: type, bits, group size and symmetry.
        name: the layer, for errors.

    Returns:
        Stored weights `[out, in]` int8 or float8_e4m3fn, scales `[out, groups]` float32, and zero points likewise int8,
        or None. A group of zeros has scale 1. Symmetric scales map the largest magnitude to half the integer range, so
        that the range is symmetric around zero but for the lowest integer, which is used only by rounding.

    Raises:
        OptkitError: a weight is not finite.
    """
    groups = grouped(weight, scheme, name=name)
    scale, zero_point = ranges(groups.amin(-1), groups.amax(-1), scheme)
    return round_with(groups, scale, zero_point, scheme).flatten(1), scale, zero_point


def grouped(weight: Tensor, scheme: WeightScheme, *, name: str) -> Tensor:
    """`[out, groups, group size]` float32 of a matrix `[out, in]`.

    Raises:
        OptkitError: a weight is not finite.
    """
    import torch

    groups = weight.detach().float().reshape(weight.shape[0], -1, scheme.group_size or weight[0].numel())
    if not torch.isfinite(groups).all():
        raise OptkitError("a weight is not finite, so it cannot be quantized", where=name)
    return groups


def ranges(smallest: Tensor, largest: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points that cover values from `smallest` to `largest`, all of one shape.

    Returns:
        Scales float32, and zero points int8 or None, in that shape. Where there are only zeros the scale is 1.
    """
    import torch

    from optkit.quantized import FP8_MAX

    low, high = scheme.range
    smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
    if scheme.symmetric:
        half = FP8_MAX if scheme.type == "float" else (high - low) / 2
        scale = torch.maximum(-smallest, largest) / half
    else:
        scale = (largest - smallest) / (high - low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = None if scheme.symmetric else (low - smallest / scale).round().clamp(low, high).to(torch.int8)
    return scale, zero_point


def round_with(values: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme) -> Tensor:
    """Stored weights for given scales.

    Args:
        values: `[..., n]` float32.
        scale: `[...]` float32, one for each vector of `values`.
        zero_point: `[...]` int8 or None.
        scheme: type and bits.

    Returns:
        `[..., n]` int8 or float8_e4m3fn.
    """
    from optkit.quantized import FP8_MAX

    divided = values / scale.unsqueeze(-1)
    if scheme.type == "float":
        return divided.clamp(-FP8_MAX, FP8_MAX).to(scheme.dtype)
    if zero_point is not None:
        divided = divided + zero_point.to(divided.dtype).unsqueeze(-1)
    return divided.round().clamp(*scheme.range).to(scheme.dtype)


def least_wrong(
    groups: Tensor, shares: Iterable[float], scheme: WeightScheme, error: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of ranges shrunk so that each group errs least; weights beyond a range are clipped.

    Args:
        groups: `[out, groups, group size]` float32.
        shares: of the whole range, to try; of equals the first is taken.
        scheme: of the integers.
        error: from what rounding changes, in the shape of `groups` and free to be overwritten, to `[out, groups]`.

    Returns:
        Scales `[out, groups]` float32, and zero points likewise int8, or None.
    """
    import torch

    smallest, largest = groups.amin(-1), groups.amax(-1)
    scale, zero_point = ranges(smallest, largest, scheme)
    least = torch.full_like(scale, torch.inf)
    for share in shares:
        tried, zero = ranges(smallest * share, largest * share, scheme)
        values = round_with(groups, tried, zero, scheme).float()
        if zero is not None:
            values -= zero.unsqueeze(-1)
        wrong = error(values.mul_(tried.unsqueeze(-1)).sub_(groups))
        better = wrong < least
        least, scale = torch.where(better, wrong, least), torch.where(better, tried, scale)
        if zero is not None and zero_point is not None:
            zero_point = torch.where(better, zero, zero_point)
    return scale, zero_point
