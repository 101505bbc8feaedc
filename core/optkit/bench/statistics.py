"""Ratios with intervals, and what may be said of them. Pure functions, the same numbers for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["FEWEST_BLOCKS", "Estimate", "Verdict", "median_ratio", "percentile_interval", "verdict"]

Verdict = Literal["better", "worse", "equivalent", "inconclusive"]

FEWEST_BLOCKS = 5
"""With five blocks their whole range covers the median with 94% (1 - 2 * 0.5**5). With fewer, nothing is concluded."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95% confidence interval."""

    value: float
    low: float
    high: float


def percentile_interval(replicates: npt.NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """The percentile bootstrap interval from the figure's value in each resample.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return float(low), float(high)


def median_ratio(log_ratios: npt.ArrayLike, *, seed: int = 0, resamples: int = 10_000) -> Estimate:
    """The median ratio of paired measurements, its interval by resampling the pairs.

    Args:
        log_ratios: `[blocks]`, natural logarithm of one arm's figure over the other's, measured in the same block.
            Negating them (swapping the arms) gives exactly the inverse ratio.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: there is no block, or a ratio is not finite.
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError("log ratios must be finite, and at least one")
    picked = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = percentile_interval(np.median(values[picked], axis=1))
    return Estimate(*(float(np.exp(value)) for value in (np.median(values), low, high)))


def verdict(
    ratio: Estimate, better: Literal["higher", "lower"], margin: float, noise: Estimate | None = None
) -> Verdict:
    """What a ratio with its interval allows to say.

    `equivalent`: the whole interval lies within the margin, which counts in both directions alike, from
    `1 / (1 + margin)` to `1 + margin`. `better` or `worse`: the whole interval lies on that side of 1, farther out than
    an arm measured against itself strayed. Everything else is `inconclusive`. Swapping the arms swaps better and worse.

    Args:
        ratio: of the judged figure over the baseline's.
        better: the metric's direction.
        margin: largest difference that does not matter, as a fraction.
        noise: the ratio of an arm to itself (A/A), which would be 1 on a quiet machine.
    """
    low, high = np.log(ratio.low), np.log(ratio.high)
    if max(-low, high) <= np.log1p(margin):
        return "equivalent"
    floor = 0.0 if noise is None else max(abs(np.log(noise.low)), abs(np.log(noise.high)))
    if low > floor:
        return "better" if better == "higher" else "worse"
    if high < -floor:
        return "worse" if better == "higher" else "better"
    return "inconclusive"
