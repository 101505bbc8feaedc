"""From samples to figures: ratios to the baseline with intervals and verdicts, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from optkit.bench.interleave import Samples
from optkit.bench.statistics import FEWEST_BLOCKS, Estimate, Verdict, median_ratio, verdict
from optkit.metrics import EncodingMetric, Footprint, FootprintMetric, ImageRunMetric, RunMetric

__all__ = ["Comparison", "Withheld", "compare", "compare_footprints"]

AnyRunMetric = RunMetric | EncodingMetric | ImageRunMetric


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of one arm beside the baseline's."""

    metric: str
    arm: str
    unit: str
    better: Literal["higher", "lower"]
    baseline: float
    """The baseline's figure, the median over blocks."""
    value: float
    """The arm's figure, the median over blocks."""
    ratio: Estimate
    """The arm's over the baseline's, the median of the blocks' ratios; not the ratio of the two medians."""
    noise: Estimate | None
    """The ratio of an arm to itself, where one took part twice."""
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Withheld:
    """A figure that cannot be trusted."""

    metric: str
    arm: str
    unit: str
    better: Literal["higher", "lower"]
    withheld: str
    """Why."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


def compare(
    samples: Samples[Any],
    metrics: Mapping[str, RunMetric] | Mapping[str, EncodingMetric] | Mapping[str, ImageRunMetric],
    baseline: str,
    margin: float = 0.05,
) -> list[Comparison | Withheld]:
    """Judge every arm but the baseline by every metric.

    The block is the unit: an arm's figure in a block is the geometric mean of its runs there. Speed is withheld when an
    arm did not do the work that was asked for, or gave one token over and over where the baseline did not.

    Args:
        samples: from `measure` or `measure_passes`.
        metrics: by name, for runs of that kind.
        baseline: name of the arm that the others are compared with.
        margin: see `optkit.bench.statistics.verdict`.
    """
    judged = [arm for arm in samples.arms if arm != baseline and (samples.again is None or arm != samples.again[1])]
    found: list[Comparison | Withheld] = []
    for arm in judged:
        reason = _distrust(samples, baseline, arm)
        for name, metric in metrics.items():
            found.append(_compare(samples, name, metric, baseline, arm, margin, reason))
    return found


def compare_footprints(
    baseline: Footprint, candidate: Footprint, metrics: Mapping[str, FootprintMetric], arm: str, margin: float = 0.05
) -> list[Comparison]:
    """The same for sizes, which do not vary from run to run: their interval is a point."""
    found = []
    for name, metric in metrics.items():
        before, after = metric.of(baseline), metric.of(candidate)
        ratio = Estimate(after / before, after / before, after / before)
        judged = verdict(ratio, metric.better, margin)
        found.append(Comparison(name, arm, metric.unit, metric.better, before, after, ratio, None, judged))
    return found


def _compare(
    samples: Samples[Any],
    name: str,
    metric: AnyRunMetric,
    baseline: str,
    arm: str,
    margin: float,
    reason: str | None,
) -> Comparison | Withheld:
    if reason is not None:
        return Withheld(name, arm, metric.unit, metric.better, reason)
    before, after = _blocks(samples, metric, baseline), _blocks(samples, metric, arm)
    twins = [] if samples.again is None else [_blocks(samples, metric, twin) for twin in samples.again]
    if not all(np.isfinite(values).all() for values in (before, after, *twins)):
        return Withheld(name, arm, metric.unit, metric.better, "runs of this length have no such figure")
    seed = samples.workload.seed
    ratio = median_ratio(after - before, seed=seed)
    noise = median_ratio(twins[1] - twins[0], seed=seed) if twins else None
    enough = samples.workload.blocks >= FEWEST_BLOCKS
    return Comparison(
        metric=name,
        arm=arm,
        unit=metric.unit,
        better=metric.better,
        baseline=float(np.exp(np.median(before))),
        value=float(np.exp(np.median(after))),
        ratio=ratio,
        noise=noise,
        verdict=verdict(ratio, metric.better, margin, noise) if enough else "inconclusive",
    )


def _blocks(samples: Samples[Any], metric: AnyRunMetric, arm: str) -> npt.NDArray[np.float64]:
    """`[blocks]`, the mean logarithm of the metric over the arm's runs in each block; NaN where it has none."""
    logs: list[list[float]] = [[] for _ in range(samples.workload.blocks)]
    for sample in samples.of(arm):
        figure = metric.of(sample.run)
        logs[sample.block].append(np.log(figure) if figure > 0 else np.nan)
    return np.array([np.mean(block) if block else np.nan for block in logs])


def _distrust(samples: Samples[Any], baseline: str, arm: str) -> str | None:
    arms, work = {baseline, arm, *(samples.again or ())}, samples.workload
    for name in samples.arms:
        if name in arms:
            for sample in samples.of(name):
                reason = work.differs(sample.run)
                if reason is not None:
                    return f"{name} in block {sample.block + 1}: {reason}"
    found, expected = (work.degenerate([sample.run for sample in samples.of(one)]) for one in (arm, baseline))
    return f"{arm} {found} and {baseline} does not" if found is not None and expected is None else None
