"""What an apply measures: quality through any scorer, and speed, memory and size of what the backend opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from optkit.apply.workshop import Workshop
from optkit.bench import (
    Files,
    Opening,
    SessionArm,
    TransformersArm,
    Workload,
    compare,
    compare_footprints,
    measure,
    peak_memory,
    verdict,
)
from optkit.errors import OptkitError, RecipeError
from optkit.evaluate import Quality, Scorer, evaluate
from optkit.metrics import Footprint, FootprintMetric, Metric, RunMetric, TokenMetric
from optkit.plugins import Plugins
from optkit.recipe import Benchmark, Recipe

__all__ = ["folder_bytes", "footprints", "metrics_of", "prompts_of", "quality", "speed"]

Progress = Callable[[int, int, str], None]
M = TypeVar("M", bound=Metric)

BASELINE, OPTIMIZED = "baseline", "optimized"
QUALITY_MARGIN = 0.01
"""A ratio of quality figures within one percent of 1 counts as equivalent."""


def metrics_of(plugins: Plugins, shape: type[M]) -> dict[str, M]:
    """Every installed metric of one shape, by name. One that cannot be loaded is left out, unless a gate names it."""
    found: dict[str, M] = {}
    for name in plugins.names("metric"):
        try:
            metric = plugins.get("metric", name)
        except OptkitError:
            continue
        if issubclass(metric, shape):
            found[name] = metric()
    return found


def quality(shop: Workshop, candidate: Scorer, plugins: Plugins, progress: Progress) -> dict[str, Any]:
    """Figures of a candidate by metric, JSON-able; those with a ratio to the baseline also have a verdict."""
    result = evaluate(shop.baseline_scorer, candidate, shop.windows, metrics_of(plugins, TokenMetric), progress)
    return {name: figure | _verdict(result, name) for name, figure in result.to_dict()["metrics"].items()}


def speed(
    arms: tuple[TransformersArm, SessionArm], shop: Workshop, settings: Benchmark, plugins: Plugins, progress: Progress
) -> tuple[dict[str, Any], list[str]]:
    """Figures of the second arm beside the first by metric, and the raw samples as lines of JSON. Closes the arms."""
    workload = Workload(settings.prompt_tokens, settings.output_tokens, settings.blocks, settings.seed)
    prompts = prompts_of(shop.windows, settings.prompt_tokens)
    # The A/A arm is the optimized one: its runs are short, and it is its noise that a claim must rise above.
    samples = measure(arms, prompts, workload, progress, again=arms[1].name)
    found = compare(samples, metrics_of(plugins, RunMetric), arms[0].name)
    return {comparison.metric: comparison.to_dict() for comparison in found}, samples.to_jsonl().splitlines()


def footprints(
    recipe: Recipe, files: Files, shop: Workshop, plugins: Plugins, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Size and peak memory by metric. Memory is measured in fresh processes.

    The size is that of the weights as they are run: the baseline's in float32, and the optimized model's compiled
    files, or its weights folder where the backend compiles nothing.
    """
    settings = recipe.benchmark
    prompt = prompts_of(shop.windows, settings.prompt_tokens)[0]
    compiled = folder_bytes(files.runtime)
    floats = sum(tensor.numel() * tensor.element_size() for tensor in shop.baseline.module.parameters())
    found = []
    sizes = ((BASELINE, None, floats), (OPTIMIZED, files, compiled or folder_bytes(files.weights)))
    for done, (name, opened, size) in enumerate(sizes):
        progress(done, len(sizes), f"memory of {name}")
        opening = Opening(recipe.resolved(), opened)
        found.append(Footprint(size, peak_memory(opening, plugins, prompt, settings.output_tokens)))
    progress(len(sizes), len(sizes), "memory")
    rows = compare_footprints(found[0], found[1], metrics_of(plugins, FootprintMetric), OPTIMIZED)
    return {row.metric: row.to_dict() for row in rows}


def prompts_of(windows: list[tuple[int, ...]], length: int) -> list[tuple[int, ...]]:
    """The evaluation text cut into prompts of `length` tokens.

    Raises:
        RecipeError: it is shorter than one prompt.
    """
    text = [token for window in windows for token in window]
    prompts = [tuple(text[start : start + length]) for start in range(0, len(text) - length + 1, length)]
    if not prompts:
        raise RecipeError(
            f"the evaluation text has {len(text)} tokens, the benchmark's prompt needs {length}",
            remedy="raise evaluation.tokens or lower benchmark.prompt_tokens",
        )
    return prompts


def folder_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _verdict(result: Quality, name: str) -> Mapping[str, Any]:
    figure = result.metrics[name]
    return {} if figure.ratio is None else {"verdict": verdict(figure.ratio, figure.better, QUALITY_MARGIN)}

