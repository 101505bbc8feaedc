"""The figures of configurations beside a first one, by every installed metric of their task."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from optkit.bench import Arm, Opening, compare, compare_footprints, peak_memory, verdict
from optkit.errors import OptkitError
from optkit.hardware import usable_cores
from optkit.measure.task import AnyTask
from optkit.metrics import Footprint, FootprintMetric, Metric
from optkit.plugins import Plugins
from optkit.recipe import Benchmark

__all__ = [
    "BASELINE",
    "OPTIMIZED",
    "Contestant",
    "Figures",
    "Progress",
    "compressed_bytes",
    "folder_bytes",
    "footprints",
    "made_without_options",
    "metrics_of",
    "quality",
    "speed",
]

# Read at once.
_PIECE = 16 << 20

Progress = Callable[[str, int, int, str], None]
"""`progress(step, done, total, what)`."""
Figures = dict[str, dict[str, Any]]
"""By metric: `unit`, `better`, `baseline`, `value`, `ratio` or `interval`, `verdict`, or `withheld` with its reason."""
M = TypeVar("M", bound=Metric)

BASELINE, OPTIMIZED = "baseline", "optimized"
"""What `apply` calls the two, whatever the recipe is called."""
QUALITY_MARGIN = 0.01
"""A ratio of quality figures within one percent of 1 counts as equivalent."""


def metrics_of(plugins: Plugins, shape: Callable[..., M]) -> dict[str, M]:
    """Every installed metric of one shape, by name. One that cannot be loaded, or made without options, is left out.

    `make_plan` refuses a gate on such a one.
    """
    found: dict[str, M] = {}
    for name in plugins.names("metric"):
        try:
            metric = plugins.get("metric", name)
        except OptkitError:
            continue
        if issubclass(metric, shape) and made_without_options(metric):  # type: ignore[arg-type]  # a class; typed as callable because it is abstract
            found[name] = metric()
    return found


def made_without_options(metric: type[Metric]) -> bool:
    """Whether it can be: recipes have no place for options of a metric."""
    return not any(option.is_required() for option in metric.model_fields.values())


def quality(
    task: AnyTask,
    baseline: Any,
    candidate: Any,
    data: Any,
    plugins: Plugins,
    progress: Callable[..., None],
) -> Figures:
    """Figures of a candidate beside the baseline, both scorers of `task`; those with a ratio have a verdict."""
    result = task.evaluate(baseline, candidate, data, metrics_of(plugins, task.quality_metric), progress)
    figures: Figures = result.to_dict()["metrics"]
    for name, figure in result.metrics.items():
        if figure.ratio is not None:
            figures[name]["verdict"] = verdict(figure.ratio, figure.better, QUALITY_MARGIN)
    return figures


def speed(
    task: AnyTask,
    arms: Sequence[Arm],
    data: Any,
    settings: Benchmark,
    plugins: Plugins,
    progress: Callable[..., None],
) -> tuple[dict[str, Figures], list[str]]:
    """Figures of every arm beside the first, by arm, and the raw samples as lines of JSON. Closes the arms.

    The A/A arm is the last one: an optimized model's runs are short, and its noise is what a claim must rise above.
    """
    samples = task.time(arms, data, settings, progress)
    figures: dict[str, Figures] = {arm.name: {} for arm in arms[1:]}
    metrics: Any = metrics_of(plugins, task.speed_metric)
    for comparison in compare(samples, metrics, arms[0].name):
        figures[comparison.arm][comparison.metric] = comparison.to_dict()
    return figures, samples.to_jsonl().splitlines()


@dataclass(frozen=True, slots=True)
class Contestant:
    """One configuration that takes part in a comparison."""

    name: str
    opening: Opening
    weight_bytes: int
    """Of the weights as they are run: float32 for a baseline, compiled files or the weights folder for an artifact."""


def footprints(
    task: AnyTask,
    contestants: Sequence[Contestant],
    data: Any,
    settings: Benchmark,
    plugins: Plugins,
    progress: Callable[..., None],
) -> dict[str, Figures]:
    """Size and peak memory of every contestant beside the first. Memory is measured in fresh processes."""
    request = task.request(data, settings)
    found = []
    for done, one in enumerate(contestants):
        progress(done, len(contestants), one.name)
        found.append(Footprint(one.weight_bytes, peak_memory(one.opening, plugins, request)))
    progress(len(contestants), len(contestants), "done")
    metrics = metrics_of(plugins, FootprintMetric)
    return {
        one.name: {row.metric: row.to_dict() for row in compare_footprints(found[0], footprint, metrics, one.name)}
        for one, footprint in zip(contestants[1:], found[1:], strict=True)
    }


def folder_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def compressed_bytes(directory: Path) -> int:
    """Bytes that all files below a directory take when each is compressed in pieces, by zlib at its fastest."""

    def compressed(file: Path, start: int) -> int:
        with file.open("rb") as stream:
            stream.seek(start)
            return len(zlib.compress(stream.read(_PIECE), level=1))

    files = {file: file.stat().st_size for file in directory.rglob("*") if file.is_file()}
    pieces = [(file, start) for file, size in files.items() for start in range(0, size, _PIECE)]
    # zlib lets go of the interpreter's lock.
    with ThreadPoolExecutor(usable_cores()) as pool:
        return sum(pool.map(lambda piece: compressed(*piece), pieces))
