"""Measuring finished artifacts, beside each other or beside what they were made from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from optkit.artifact import Artifact, open_artifact
from optkit.bench import Arm, Opening, open_arm, opening_of
from optkit.errors import RecipeError
from optkit.measure.figures import (
    BASELINE,
    Contestant,
    Figures,
    Progress,
    folder_bytes,
    footprints,
    quality,
    speed,
)
from optkit.measure.tasks import task_of
from optkit.opening import bound
from optkit.plugins import Plugins
from optkit.recipe import Benchmark, EvaluationKeys

__all__ = ["baseline_of", "check_same_task", "contest", "contestant"]


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


def check_same_task(artifacts: Sequence[Artifact]) -> None:
    """Refuse to compare different kinds of models.

    Raises:
        RecipeError: one is of another task than the first.
    """
    first = task_of(artifacts[0].manifest.tags)
    for artifact in artifacts[1:]:
        other = task_of(artifact.manifest.tags)
        if other.noun != first.noun:
            raise RecipeError(
                f"is of another task ({other.noun}) than {artifacts[0].path} ({first.noun})",
                where=str(artifact.path),
                remedy="compare one task only",
            )


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
        contestants: two or more of one task; each is opened once.
        artifact: whose evaluation data are used, and what reads them.
        settings: how speed, memory and size are measured; None leaves them out.
        with_quality: whether quality is measured.

    Returns:
        Figures by contestant and metric, and the raw samples of the benchmark as lines of JSON.
    """
    task = task_of(artifact.manifest.tags)
    amount = EvaluationKeys(**artifact.manifest.recipe["evaluation"])
    dataset = bound("dataset", amount.dataset, plugins)
    longest = min(amount.context_length, artifact.manifest.max_length)
    data = task.data(task.reader_of_folder(artifact.weights), dataset, amount, longest)
    figures: dict[str, Figures] = {one.name: {} for one in contestants[1:]}
    samples: list[str] = []
    if settings is not None:
        _merge(figures, footprints(task, contestants, data, settings, plugins, _within(progress, "memory")))
    with ExitStack() as stack:
        arms: list[Arm] = []
        for one in contestants:
            arms.append(open_arm(one.opening, plugins, one.name))
            stack.callback(arms[-1].close)
        if with_quality:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            reference = task.recorded(task.scorer_of_arm(arms[0]), scratch)
            for arm in arms[1:]:
                told = _within(progress, f"quality of {arm.name}")
                figures[arm.name] |= quality(task, reference, task.scorer_of_arm(arm), data, plugins, told)
        if settings is not None:
            found_by_arm, samples = speed(task, arms, data, settings, plugins, _within(progress, "benchmark"))
            _merge(figures, found_by_arm)
    return figures, samples


def _merge(into: dict[str, Figures], new: Mapping[str, Figures]) -> None:
    for name, figures in new.items():
        into[name] |= figures


def _within(progress: Progress, step: str) -> Callable[[int, int, str], None]:
    return lambda done, total, what: progress(step, done, total, what)
