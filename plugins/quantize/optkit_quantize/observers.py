"""From what a layer's inputs are on calibration data to the one scale that serves all of them.

An observer sees tensors one after another, in bounded memory, and then names the range that 8 bits should cover.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optkit.blockwise import Block
from optkit.errors import OptkitError
from optkit.schemes import ActivationScheme, WeightScheme
from optkit_quantize.rounding import ranges

__all__ = ["Counts", "Divergence", "LeastSquares", "MinMax", "Observer", "Percentile", "input_scales"]

Floats = npt.NDArray[np.float64]

_BINS = 4096
_MAGNITUDES = 128
_STRIDE = 16
# Ranges that LeastSquares tries on a side: down to 1/235 of the largest, each 8 % below the one before.
_SHRUNK = 2.0 ** (-np.arange(64) / 8)


class Observer(ABC):
    """Sees all inputs of one layer."""

    @abstractmethod
    def see(self, input: Tensor) -> None:
        """Take note of one input, of any shape, finite."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Smallest and largest number to cover, after at least one input."""


class MinMax(Observer):
    """Covers everything that it saw."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def see(self, input: Tensor) -> None:
        low, high = input.aminmax()
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))

    def range(self) -> tuple[float, float]:
        return self._low, self._high


class Percentile(Observer):
    """Leaves out the same share of numbers at both ends.

    Paper: Wu et al., Integer Quantization for Deep Learning Inference, arXiv:2004.09602, section 3.3.

    Args:
        percentile: of the numbers that lie below the upper end, from 50 to 100.
    """

    def __init__(self, percentile: float) -> None:
        self._share = percentile / 100
        self._seen = Counts()

    def see(self, input: Tensor) -> None:
        self._seen.add(input)

    def range(self) -> tuple[float, float]:
        return self._seen.quantile(1 - self._share), self._seen.quantile(self._share)


class Divergence(Observer):
    """Covers magnitudes up to the threshold at which 128 levels of them lose the least information (KL divergence).

    Document: Migacz, 8-bit Inference with TensorRT, GTC 2017. Thresholds are tried every 16 bins.
    """

    def __init__(self) -> None:
        self._seen = Counts()

    def see(self, input: Tensor) -> None:
        self._seen.add(input)

    def range(self) -> tuple[float, float]:
        magnitudes = self._seen.magnitudes()
        candidates = [*range(_MAGNITUDES, len(magnitudes), _STRIDE), len(magnitudes)]
        best = min(candidates, key=lambda count: _lost(magnitudes, count))
        threshold = best * self._seen.width
        return max(self._seen.low, -threshold), min(self._seen.high, threshold)


class LeastSquares(Observer):
    """Covers the range with the least squared error of what it saw, rounded to int8.

    Symmetric: the best of 64 shrunken ranges. Asymmetric: the ends are shrunken in turns, from the whole range, until
    neither gets better.

    Args:
        symmetric: whether the range that is covered lies around zero.
    """

    def __init__(self, *, symmetric: bool) -> None:
        self._symmetric = symmetric
        self._seen = Counts()

    def see(self, input: Tensor) -> None:
        self._seen.add(input)

    def range(self) -> tuple[float, float]:
        low, high = min(self._seen.low, 0.0), max(self._seen.high, 0.0)
        values, counts = self._seen.centres()
        if self._symmetric:
            ends = max(-low, high) * _SHRUNK
            zero = np.zeros(len(ends))
            end = float(ends[np.argmin(_squares(values, counts, ends / 127.5, zero))])
            return -end, end
        lows, highs = low * _SHRUNK, high * _SHRUNK
        chosen = (0, 0)
        while True:
            first = int(np.argmin(_squares(values, counts, *_asymmetric(lows, highs[chosen[1]]))))
            second = int(np.argmin(_squares(values, counts, *_asymmetric(lows[first], highs))))
            if (first, second) == chosen:
                return float(lows[first]), float(highs[second])
            chosen = first, second


class Counts:
    """How many numbers fell into each of 4096 bins, which widen as numbers need it.

    The width is a power of two and edges are its multiples, so that widening joins whole bins: the counts are those of
    all numbers at once.

    Attributes:
        low: the smallest number.
        high: the largest one.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._counts: Tensor | None = None
        self._exponent = -126
        self._origin = 0

    @property
    def width(self) -> float:
        """Of a bin."""
        return math.ldexp(1.0, self._exponent)

    def add(self, values: Tensor) -> None:
        """Count finite numbers."""
        # float64: there the quotient by the width is exact.
        values = values.detach().flatten().double()
        low, high = (float(end) for end in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        exponent, first = self._exponent, self._counts is None
        if first:
            # A hint only: constants would fit into bins of any width.
            size = max(self.high - self.low, max(-self.low, self.high) / 4)
            exponent = max(exponent, math.frexp(size / _BINS)[1] - 1)
        while math.floor(self.high / 2.0**exponent) - math.floor(self.low / 2.0**exponent) >= _BINS:
            exponent += 1
        origin = math.floor(self.low / 2.0**exponent)
        counts = torch.zeros(_BINS, dtype=torch.int64, device=values.device)
        if self._counts is not None:
            places = (torch.arange(_BINS, device=values.device) + self._origin) >> (exponent - self._exponent)
            # Bins outside are empty.
            counts.index_add_(0, (places - origin).clamp(0, _BINS - 1), self._counts)
        self._exponent, self._origin = exponent, origin
        counts += torch.bincount((values / self.width).floor().long() - origin, minlength=_BINS)
        self._counts = counts

    def quantile(self, share: float) -> float:
        """The number below which a share of them lies, numbers of one bin spread evenly over it."""
        counts = self._array()
        below = np.cumsum(counts)
        place = int(np.searchsorted(below, share * below[-1]))
        inside = (share * below[-1] - (below[place] - counts[place])) / counts[place] if counts[place] else 0.0
        return min(max(float(self._origin + place + inside) * self.width, self.low), self.high)

    def centres(self) -> tuple[Floats, Floats]:
        """The middle of each bin that has numbers, and how many."""
        counts = self._array()
        used = np.flatnonzero(counts)
        return ((self._origin + used + 0.5) * self.width).astype(np.float64), counts[used]

    def magnitudes(self) -> Floats:
        """How many numbers have an absolute value in each bin from zero on; the last one has some."""
        counts = self._array()
        places = np.arange(len(counts)) + self._origin
        # Bin -1 is the mirror image of bin 0.
        mirrored = np.where(places < 0, -1 - places, places)
        used = counts > 0
        return np.bincount(mirrored[used], weights=counts[used]).astype(np.float64)

    def _array(self) -> Floats:
        assert self._counts is not None
        return self._counts.cpu().numpy().astype(np.float64)


def input_scales(
    block: Block, scheme: ActivationScheme, observer: Callable[[], Observer]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Run a block, and find the scale of each chosen layer's inputs.

    Args:
        block: of a walk.
        scheme: static.
        observer: makes one for each layer.

    Returns:
        By layer the scale `[1]` float32, and the zero point `[1]` int8 or None.

    Raises:
        OptkitError: a layer gets inputs that are not finite, or none.
    """
    observers = {name: observer() for name in block.names}
    devices: dict[str, torch.device] = {}

    def see(name: str, input: Tensor) -> None:
        if not torch.isfinite(input).all():
            raise OptkitError("gets NaN or infinite inputs on the calibration data", where=name)
        devices[name] = input.device
        observers[name].see(input)

    block.watch(block.names, see)
    scales = {}
    # A static scale is found as that of weights is.
    format = WeightScheme(8, None, scheme.symmetric, scheme.type)
    for name in block.names:
        if name not in devices:
            raise OptkitError("is not run on the calibration data", where=name, remedy="add it to ignore")
        low, high = (torch.tensor([end], dtype=torch.float32, device=devices[name]) for end in observers[name].range())
        scales[name] = ranges(low, high, format)
    return scales


def _lost(magnitudes: Floats, count: int) -> float:
    """KL divergence of the distribution that is cut off after `count` bins from what 128 levels make of it."""
    kept = magnitudes[:count]
    clipped = kept.copy()
    clipped[-1] += magnitudes[count:].sum()
    filled = (clipped > 0).astype(np.float64)
    starts = np.arange(min(_MAGNITUDES, count)) * count // min(_MAGNITUDES, count)
    sizes = np.diff(np.append(starts, count))
    # A level's numbers are spread over those of its bins that have any.
    bins = np.maximum(np.add.reduceat(filled, starts), 1)
    spread = np.repeat(np.add.reduceat(kept, starts) / bins, sizes) * filled
    if (spread[clipped > 0] == 0).any():
        return math.inf
    shares = clipped[clipped > 0] / clipped.sum()
    return float((shares * np.log(shares / (spread[clipped > 0] / spread.sum()))).sum())


def _asymmetric(low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """Scales and zero points that cover ranges from `low` to `high`."""
    scale = np.maximum((high - low) / 255, np.finfo(np.float64).tiny)
    return scale, np.clip(np.round(-128 - low / scale), -128, 127)


def _squares(values: Floats, counts: Floats, scales: Floats, zero_points: Floats) -> Floats:
    """Squared error of all numbers for each scale and zero point."""
    scale, zero = np.maximum(scales, np.finfo(np.float64).tiny)[:, None], zero_points[:, None]
    rounded = (np.clip(np.round(values / scale + zero), -128, 127) - zero) * scale
    errors: Floats = ((rounded - values) ** 2 * counts).sum(axis=1)
    return errors
