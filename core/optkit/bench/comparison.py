"""From samples to figures: ratios to the baseline with intervals and verdicts, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from optkit.bench.interleave import Sample, Samples, Workload
from optkit.bench.statistics import FEWEST_BLOCKS, Estimate, Verdict, median_ratio, verdict
from optkit.metrics import Footprint, FootprintMetric, RunMetric

__all__ = ["Comparison", "Withheld", "compare", "compare_footprints"]


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
    samples: Samples, metrics: Mapping[str, RunMetric], baseline: str, margin: float = 0.05
) -> list[Comparison | Withheld]:
    """Judge every arm but the baseline by every metric.

    The block is the unit: an arm's figure in a block is the geometric mean of its runs there. Speed is withheld when an
    arm did not do the work that was asked for, or gave one token over and over where the baseline did not.

    Args:
        samples: from `measure`.
        metrics: by name.
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
    samples: Samples, name: str, metric: RunMetric, baseline: str, arm: str, margin: float, reason: str | None
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


def _blocks(samples: Samples, metric: RunMetric, arm: str) -> npt.NDArray[np.float64]:
    """`[blocks]`, the mean logarithm of the metric over the arm's runs in each block; NaN where it has none."""
    logs: list[list[float]] = [[] for _ in range(samples.workload.blocks)]
    for sample in samples.of(arm):
        figure = metric.of(sample.run)
        logs[sample.block].append(np.log(figure) if figure > 0 else np.nan)
    return np.array([np.mean(block) if block else np.nan for block in logs])


def _distrust(samples: Samples, baseline: str, arm: str) -> str | None:
    arms = {baseline, arm, *(samples.again or ())}
    for name in samples.arms:
        if name in arms:
            for sample in samples.of(name):
                reason = _work_differs(sample, samples.workload)
                if reason is not None:
                    return f"{name} in block {sample.block + 1}: {reason}"
    if _monotonous(samples.of(arm)) and not _monotonous(samples.of(baseline)):
        return f"{arm} repeats one token over and over and {baseline} does not"
    return None


def _work_differs(sample: Sample, workload: Workload) -> str | None:
    run = sample.run
    if run.prompt_tokens != workload.prompt_tokens:
        return f"{run.prompt_tokens} prompt tokens instead of {workload.prompt_tokens}"
    if not len(run.output) == len(run.token_seconds) == workload.output_tokens:
        return f"{len(run.output)} output tokens instead of {workload.output_tokens}, {len(run.token_seconds)} timed"
    times = np.array(run.token_seconds)
    # Several tokens may share a moment; what no clock gives is NaN, nothing, or time that runs backwards.
    if not np.isfinite(times).all() or times[0] <= 0 or (np.diff(times) < 0).any():
        return "the times of its tokens are not in order"
    return None


def _monotonous(samples: Sequence[Sample]) -> bool:
    return all(len(set(sample.run.output)) == 1 for sample in samples)
