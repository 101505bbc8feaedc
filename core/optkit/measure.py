"""Measuring configurations beside each other: quality, speed, memory and size, by every installed metric.

`apply` measures what it makes with these, and `optkit bench`, `eval` and `compare` measure finished artifacts again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from optkit.artifact import Artifact, open_artifact
from optkit.bench import (
    Arm,
    Opening,
    SessionArm,
    TransformersArm,
    Workload,
    compare,
    compare_footprints,
    measure,
    opening_of,
    peak_memory,
    verdict,
)
from optkit.bench.opening import bound, open_arm
from optkit.errors import OptkitError, RecipeError
from optkit.evaluate import ModelScorer, Recorded, Scorer, SessionScorer, evaluate, windows
from optkit.metrics import Footprint, FootprintMetric, Metric, RunMetric, TokenMetric
from optkit.plugins import Plugins
from optkit.recipe import Benchmark

__all__ = [
    "BASELINE",
    "OPTIMIZED",
    "Contestant",
    "Progress",
    "baseline_of",
    "contest",
    "contestant",
    "folder_bytes",
    "footprints",
    "measurable",
    "metrics_of",
    "prompts_of",
    "quality",
    "speed",
]

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
        if issubclass(metric, shape) and measurable(metric):  # type: ignore[arg-type]  # a class; typed as callable because it is abstract
            found[name] = metric()
    return found


def measurable(metric: type[Metric]) -> bool:
    """Whether there is a way to measure it. Recipes have no place for options of a metric."""
    shaped = issubclass(metric, TokenMetric | RunMetric | FootprintMetric)
    return shaped and not any(option.is_required() for option in metric.model_fields.values())


def quality(
    baseline: Scorer,
    candidate: Scorer,
    text: Sequence[tuple[int, ...]],
    plugins: Plugins,
    progress: Callable[..., None],
) -> Figures:
    """Figures of a candidate beside the baseline; those with a ratio have a verdict."""
    result = evaluate(baseline, candidate, text, metrics_of(plugins, TokenMetric), progress)
    figures: Figures = result.to_dict()["metrics"]
    for name, figure in result.metrics.items():
        if figure.ratio is not None:
            figures[name]["verdict"] = verdict(figure.ratio, figure.better, QUALITY_MARGIN)
    return figures


def speed(
    arms: Sequence[Arm],
    text: Sequence[tuple[int, ...]],
    settings: Benchmark,
    plugins: Plugins,
    progress: Callable[..., None],
) -> tuple[dict[str, Figures], list[str]]:
    """Figures of every arm beside the first, by arm, and the raw samples as lines of JSON. Closes the arms.

    The A/A arm is the last one: an optimized model's runs are short, and its noise is what a claim must rise above.
    """
    workload = Workload(settings.prompt_tokens, settings.output_tokens, settings.blocks, settings.seed)
    prompts = prompts_of(text, settings.prompt_tokens)
    samples = measure(arms, prompts, workload, progress, again=arms[-1].name)
    figures: dict[str, Figures] = {arm.name: {} for arm in arms[1:]}
    for comparison in compare(samples, metrics_of(plugins, RunMetric), arms[0].name):
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
    contestants: Sequence[Contestant],
    text: Sequence[tuple[int, ...]],
    settings: Benchmark,
    plugins: Plugins,
    progress: Callable[..., None],
) -> dict[str, Figures]:
    """Size and peak memory of every contestant beside the first. Memory is measured in fresh processes."""
    prompt = prompts_of(text, settings.prompt_tokens)[0]
    found = []
    for done, one in enumerate(contestants):
        progress(done, len(contestants), one.name)
        found.append(Footprint(one.weight_bytes, peak_memory(one.opening, plugins, prompt, settings.output_tokens)))
    progress(len(contestants), len(contestants), "done")
    metrics = metrics_of(plugins, FootprintMetric)
    return {
        one.name: {row.metric: row.to_dict() for row in compare_footprints(found[0], footprint, metrics, one.name)}
        for one, footprint in zip(contestants[1:], found[1:], strict=True)
    }


def prompts_of(text: Sequence[tuple[int, ...]], length: int) -> list[tuple[int, ...]]:
    """Windows of evaluation text cut into prompts of `length` tokens.

    Raises:
        RecipeError: there is less text than one prompt.
    """
    tokens = [token for window in text for token in window]
    prompts = [tuple(tokens[start : start + length]) for start in range(0, len(tokens) - length + 1, length)]
    if not prompts:
        raise RecipeError(
            f"the evaluation text has {len(tokens)} tokens, the benchmark's prompt needs {length}",
            remedy="raise evaluation.tokens or lower benchmark.prompt_tokens",
        )
    return prompts


def folder_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


# --- finished artifacts


def contestant(path: Path) -> tuple[Contestant, Artifact]:
    """A verified artifact as a contestant under its path's name, which is never the baseline's."""
    artifact = open_artifact(path)
    size = folder_bytes(artifact.runtime) or folder_bytes(artifact.weights)
    name = str(path) if str(path) != BASELINE else f"./{path}"
    return Contestant(name, opening_of(artifact), size), artifact


def baseline_of(artifact: Artifact, plugins: Plugins) -> Contestant:
    """The unoptimized model that an artifact was made from."""
    recipe = artifact.manifest.recipe
    card = bound("source", recipe.get("model"), plugins).inspect()
    return Contestant(BASELINE, Opening(recipe, None), card.parameters * card.bytes_per_parameter)


def contest(
    contestants: Sequence[Contestant],
    artifact: Artifact,
    settings: Benchmark | None,
    plugins: Plugins,
    progress: Progress,
    *,
    with_quality: bool,
) -> tuple[dict[str, Figures], list[str]]:
    """Measure contestants beside the first.

    Args:
        contestants: two or more; each is opened once.
        artifact: whose tokenizer and evaluation text are used.
        settings: how speed, memory and size are measured; None leaves them out.
        with_quality: whether quality is measured.

    Returns:
        Figures by contestant and metric, and the raw samples of the benchmark as lines of JSON.
    """
    from optkit.engine.text import load_tokenizer

    settings_of_text = artifact.manifest.recipe["evaluation"]
    dataset = bound("dataset", settings_of_text["dataset"], plugins)
    tokenizer = load_tokenizer(artifact.weights)
    text = windows(tokenizer, dataset, settings_of_text["tokens"], settings_of_text["context_length"])
    figures: dict[str, Figures] = {one.name: {} for one in contestants[1:]}
    samples: list[str] = []
    if settings is not None:
        _merge(figures, footprints(contestants, text, settings, plugins, _within(progress, "memory")))
    with ExitStack() as stack:
        arms = []
        for one in contestants:
            arms.append(open_arm(one.opening, plugins, one.name))
            stack.callback(arms[-1].close)
        if with_quality:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            reference = Recorded(_scorer(arms[0]), scratch)
            for arm in arms[1:]:
                found = quality(reference, _scorer(arm), text, plugins, _within(progress, f"quality of {arm.name}"))
                figures[arm.name] |= found
        if settings is not None:
            found_by_arm, samples = speed(arms, text, settings, plugins, _within(progress, "benchmark"))
            _merge(figures, found_by_arm)
    return figures, samples


def _scorer(arm: Arm) -> Scorer:
    if isinstance(arm, TransformersArm):
        return ModelScorer(arm.module)
    assert isinstance(arm, SessionArm)
    return SessionScorer(arm.session)


def _merge(into: dict[str, Figures], new: Mapping[str, Figures]) -> None:
    for name, figures in new.items():
        into[name] |= figures


def _within(progress: Progress, step: str) -> Callable[[int, int, str], None]:
    return lambda done, total, what: progress(step, done, total, what)
