"""A candidate's predictions beside the baseline's, window by window; logits of more than one window are never held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from optkit.bench.statistics import Estimate, percentile_interval
from optkit.errors import DamagedError, GateFailed
from optkit.evaluate.scorers import Scorer
from optkit.metrics import ClassificationMetric, EmbeddingMetric, TokenMetric

__all__ = ["Figure", "Quality", "distance", "evaluate", "figure_of", "parity"]

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]

_RESAMPLES = 2_000
# Neighbouring tokens depend on each other, so stretches of text are resampled and not tokens. With fewer of them than
# this, windows are split: an interval from a handful of windows would be far too narrow.
_FEWEST_STRETCHES = 16


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of the candidate beside the baseline's."""

    unit: str
    better: Literal["higher", "lower"]
    baseline: float
    value: float
    interval: Estimate
    """Of the candidate's figure on other text of this kind."""
    ratio: Estimate | None
    """Candidate over baseline on the same text, so that what both find hard cancels out. None where the baseline's
    figure is fixed by the metric's definition, such as its divergence from itself, or may be 0."""


@dataclass(frozen=True, slots=True)
class Quality:
    """What `evaluate` found."""

    windows: int
    """Windows of text, or the sequences that an encoder read, or images."""
    tokens: int
    """Predicted tokens, or the tokens that an encoder read, or images."""
    metrics: Mapping[str, Figure]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "windows": self.windows,
            "tokens": self.tokens,
            "metrics": {name: asdict(figure) for name, figure in self.metrics.items()},
        }


def evaluate(
    baseline: Scorer,
    candidate: Scorer,
    windows: Sequence[tuple[int, ...]],
    metrics: Mapping[str, TokenMetric],
    progress: Progress,
) -> Quality:
    """Judge a candidate. Position t of a window predicts token t + 1, so its last position predicts nothing.

    Args:
        baseline: the unoptimized model.
        candidate: the model that is judged, with the same vocabulary.
        windows: token ids, at least one window of at least two.
        metrics: by name.
        progress: `progress(done, total, what)` after each window.

    Raises:
        GateFailed: the candidate gives NaN, infinite or misshapen logits.
        DamagedError: the baseline gives NaN or infinite logits.
    """
    judged: dict[str, list[Floats]] = {name: [] for name in metrics}
    reference: dict[str, list[Floats]] = {name: [] for name in metrics}
    progress(0, len(windows), "windows")
    for done, window in enumerate(windows, 1):
        expected, found = _pair(baseline, candidate, window)
        expected, found, targets = expected[:-1], found[:-1], np.array(window[1:], np.int64)
        # Two figures of the same values, such as a mean and a percentile, need them only once.
        values: dict[Any, tuple[Floats, Floats]] = {}
        for name, metric in metrics.items():
            key = (type(metric).per_token, metric.model_dump_json())
            if key not in values:
                values[key] = (
                    metric.per_token(expected, expected, targets),
                    metric.per_token(found, expected, targets),
                )
            reference[name].append(values[key][0])
            judged[name].append(values[key][1])
        progress(done, len(windows), "windows")
    figures = {name: figure_of(metric, reference[name], judged[name]) for name, metric in metrics.items()}
    return Quality(len(windows), sum(len(window) - 1 for window in windows), figures)


def parity(reference: Scorer, candidate: Scorer, windows: Sequence[tuple[int, ...]]) -> float:
    """Distance of two scorers that should be the same model: the largest `|a - b| / |a|` of a window's logits.

    To be held against `optkit.backends.Lowering.tolerance`.

    Raises:
        GateFailed, DamagedError: see `evaluate`.
    """
    return max(distance(*_pair(reference, candidate, window)) for window in windows)


def distance(expected: Floats, found: Floats) -> float:
    """`|a - b| / |a|` of two arrays `[positions, ...]`."""
    squares = [
        (np.sum(np.square(a.astype(np.float64) - b)), np.sum(np.square(a.astype(np.float64))))
        for a, b in zip(expected, found, strict=True)
    ]
    apart, norm = np.sum(squares, axis=0)
    return float(np.sqrt(apart / norm))


def _pair(baseline: Scorer, candidate: Scorer, window: tuple[int, ...]) -> tuple[Floats, Floats]:
    expected, found = baseline.logits(window), candidate.logits(window)
    if not np.isfinite(expected).all():
        raise DamagedError("the baseline gives NaN or infinite logits", remedy="check the model's files")
    if found.shape != expected.shape:
        raise GateFailed(
            f"the model gives logits of another shape than the baseline's {expected.shape}", found=found.shape
        )
    if not np.isfinite(found).all():
        raise GateFailed("the model gives NaN or infinite logits", remedy="remove the transform that broke it")
    return expected, found


def figure_of(
    metric: TokenMetric | EmbeddingMetric | ClassificationMetric, reference: list[Floats], judged: list[Floats]
) -> Figure:
    """The figure of a metric with its interval.

    Args:
        metric: whose values they are.
        reference: of the baseline, `[values]` for each window, sequence or image.
        judged: of the candidate, for the same ones.
    """
    before, after = np.concatenate(reference), np.concatenate(judged)
    fixed = bool((before == before[0]).all())
    value, origin = metric.aggregate(after), metric.aggregate(before)
    parts = -(-_FEWEST_STRETCHES // len(judged))
    pairs = [
        stretch
        for one, other in zip(reference, judged, strict=True)
        for stretch in zip(np.array_split(one, parts), np.array_split(other, parts), strict=True)
        if len(stretch[0])
    ]
    random = np.random.default_rng(0)
    values, origins = np.empty(_RESAMPLES), np.full(_RESAMPLES, origin)
    for index in range(_RESAMPLES):
        picked = [pairs[i] for i in random.integers(len(pairs), size=len(pairs))]
        values[index] = metric.aggregate(np.concatenate([pair[1] for pair in picked]))
        if not fixed:
            origins[index] = metric.aggregate(np.concatenate([pair[0] for pair in picked]))
    # To a figure that may as well be 0 there is no ratio.
    related = not fixed and bool(origins.all())
    return Figure(
        unit=metric.unit,
        better=metric.better,
        baseline=origin,
        value=value,
        interval=Estimate(value, *percentile_interval(values)),
        ratio=Estimate(value / origin, *percentile_interval(values / origins)) if related else None,
    )
