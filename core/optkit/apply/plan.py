"""What a recipe will do on this machine, or the first thing wrong with it. Reads no weights, imports no runtime."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from optkit import hardware
from optkit.backends import Backend, Lowering
from optkit.errors import DamagedError, MachineError, MissingError, OptkitError, RecipeError
from optkit.locations import cache_root
from optkit.measure import AnyTask, measurable, task_of
from optkit.metrics import FootprintMetric
from optkit.model import ModelCard
from optkit.options import Options
from optkit.plugins import Plugins
from optkit.quantities import size
from optkit.recipe import (
    Benchmark,
    CalibrationData,
    CalibrationKeys,
    Evaluation,
    EvaluationKeys,
    Recipe,
    RecipeKeys,
)
from optkit.schemes import BFLOAT16_CACHE
from optkit.steps import Limits
from optkit.transforms import Transform

__all__ = ["Estimate", "Plan", "PlannedStep", "check_output", "check_room", "make_plan"]

_FLOAT = 4
# Of what the GEMM probe reaches: a whole model also normalizes, attends and dispatches.
_EFFICIENCY = 0.5
_KEYS: dict[tuple[str, ...], type[Options]] = {
    (): RecipeKeys,
    ("benchmark",): Benchmark,
    ("calibration",): CalibrationKeys,
    ("evaluation",): EvaluationKeys,
}
_NEED_KERNELS = ("weights:", "activations:", "kv:")
# Zeros need no kernel of their own; without one they are no faster.
_DENSE = Lowering(
    "dense kernels",
    native=False,
    tolerance=0.0,
    reason="zeros are multiplied as any weight, so nothing runs faster, and files shrink only when compressed",
)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A transform with the tags and the facts of the model after it."""

    name: str
    tags: frozenset[str]
    card: ModelCard


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the work will take, estimated from the model's shapes."""

    memory_bytes: int
    """Peak resident memory of `apply`."""
    disk_bytes: int
    """Written to the cache and the output together, at the peak."""
    weight_bytes: int
    """Of the optimized model's stored weights."""
    seconds: float
    """Of an apply that finds nothing in the cache; within a factor of two or three."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe that was checked against its model, its plugins and this machine."""

    recipe: Recipe
    """With the gates of the model's task, where it set none."""
    card: ModelCard
    steps: tuple[PlannedStep, ...]
    lowering: dict[str, Lowering]
    limits: Limits
    estimate: Estimate
    warnings: tuple[str, ...] = ()
    """What may well go wrong, one line each."""

    @property
    def task(self) -> AnyTask:
        """What measuring means for this model."""
        return task_of(self.card.tags)

    @property
    def tags(self) -> frozenset[str]:
        """Of the model that the backend gets."""
        return self.steps[-1].tags if self.steps else self.card.tags


def make_plan(recipe: Recipe, plugins: Plugins) -> Plan:
    """Check everything that can be checked before the work.

    Raises:
        RecipeError: steps in an order that cannot work, options that do not fit the model, or a weight format that the
            backend cannot run; with position and remedy.
        MissingError: the model, the evaluation data, or what the backend needs, is not on this machine.
        DamagedError: the model or the data are not in their format.
        MachineError: too little memory or disk.
    """
    _check_gates(recipe, plugins)
    card = _inspect(recipe)
    task = task_of(card.tags)
    if recipe.gates is None:
        recipe = replace(recipe, gates=task.gates)
    _check_task(recipe, task, plugins)
    steps = _fold(recipe, card)
    tags = steps[-1].tags if steps else card.tags
    lowering = _lower(recipe, tags)
    _check_batching(recipe)
    _check_datasets(recipe, task)
    limits = _limits(recipe, card, task)
    gated = [plugins.get("metric", gate.metric) for gate in recipe.gates or ()]
    dense = [tag for tag, lowered in lowering.items() if tag.startswith("sparsity:") and not lowered.native]
    warnings = (
        *task.check(recipe, card, gated),
        *(f"{recipe.backend.name} gains nothing from {tag}: {lowering[tag].reason}" for tag in dense),
    )
    estimate = _estimate(recipe, card, limits, task, steps)
    _preflight(estimate)
    return Plan(recipe, card, steps, lowering, limits, estimate, warnings)


def _inspect(recipe: Recipe) -> ModelCard:
    try:
        return recipe.model.options.inspect()
    except OptkitError as error:
        raise recipe.placed(error, "model", recipe.model.name) from error


def _check_gates(recipe: Recipe, plugins: Plugins) -> None:
    for index, gate in enumerate(recipe.gates or ()):
        metric = plugins.get("metric", gate.metric, where=recipe.document.where("gates", index, "metric"))
        if not measurable(metric):
            raise recipe.document.error(
                f"{gate.metric} is no metric of quality, runs or footprints, or has options that must be given",
                "gates",
                index,
                remedy="gate on another metric",
            )
        if gate.limit.kind == "ratio" and not metric.relative:
            raise recipe.document.error(
                f"{gate.metric} has no ratio to the baseline, it is a distance from it",
                "gates",
                index,
                remedy="give a plain number as the limit",
            )


def _check_task(recipe: Recipe, task: AnyTask, plugins: Plugins) -> None:
    """Refuse what means nothing for this kind of model."""
    for index, gate in enumerate(recipe.gates or ()):
        if not issubclass(
            plugins.get("metric", gate.metric), (task.quality_metric, task.speed_metric, FootprintMetric)
        ):
            usual = " or ".join(usual.metric for usual in task.gates)
            raise recipe.document.error(
                f"{gate.metric} is no metric of this model's task ({task.noun})",
                "gates",
                index,
                remedy=f"gate on {usual}",
            )
    for keys in task.meaningless:
        *section, key = keys
        asked = getattr(recipe, section[0]) if section else recipe
        given = getattr(asked, key, None)
        # A resolved recipe has every default written out.
        if asked is not None and given != _KEYS[tuple(section)].model_fields[key].default:
            what = f"means nothing for this model's task ({task.noun})"
            raise recipe.document.error(what, *keys, found=given, remedy="remove it")


def _check_datasets(recipe: Recipe, task: AnyTask) -> None:
    """Refuse text for models of images, and images for models of text."""
    sections: dict[str, Evaluation | CalibrationData | None] = {
        "evaluation": recipe.evaluation,
        "calibration": recipe.calibration,
    }
    for name, asked in sections.items():
        if asked is not None and not isinstance(asked.dataset.options, task.dataset):
            what = f"holds {asked.dataset.options.holds}, and this model reads {task.dataset.holds}"
            remedy = f"name a dataset of {task.dataset.holds}; optkit plugins list shows what is installed"
            raise recipe.document.error(what, name, "dataset", found=asked.dataset.name, remedy=remedy)


def _fold(recipe: Recipe, card: ModelCard) -> tuple[PlannedStep, ...]:
    tags, first = card.tags, card
    steps: list[PlannedStep] = []
    for index, use in enumerate(recipe.transforms):
        transform: Transform = use.options
        place = ("transforms", index, use.name)
        missing = transform.requires - tags
        if missing:
            raise recipe.document.error(
                f"needs a model with {', '.join(sorted(missing))}, and here it has {_shown(tags)}",
                *place,
                remedy="put it where the model still is that, or leave it out",
            )
        clash = sorted(tag for tag in tags if any(fnmatchcase(tag, pattern) for pattern in transform.conflicts))
        if clash:
            if clash[0] in first.tags:
                what, remedy = f"cannot work on {card.name}, which has {clash[0]}", "start from the model in float"
            else:
                cause = next(step.name for step in steps if clash[0] in step.tags)
                what = f"cannot come after {cause}, which leaves the model with {clash[0]}"
                remedy = "leave one of them out" if cause == use.name else "put it before that step, or leave one out"
            raise recipe.document.error(what, *place, remedy=remedy)
        try:
            transform.check(card)
        except RecipeError as error:
            raise recipe.document.error(error.what, *place, found=error.found, remedy=error.remedy) from error
        tags, card = tags | transform.provides(), transform.after(card)
        steps.append(PlannedStep(use.name, tags, card))
    return tuple(steps)


def _lower(recipe: Recipe, tags: frozenset[str]) -> dict[str, Lowering]:
    backend: Backend = recipe.backend.options
    missing = backend.unavailable() or backend.uncompilable()
    if missing is not None:
        raise MissingError(f"backend {recipe.backend.name!r} {missing}", where=recipe.document.where("backend"))
    lowering = dict(backend.lowering(tags))
    for tag in sorted(tag for tag in tags if tag.startswith(_NEED_KERNELS)):
        lowering.setdefault(
            tag, Lowering("", native=False, reason=f"{recipe.backend.name} has no kernel for this format")
        )
    for tag in sorted(tag for tag in tags if tag.startswith("sparsity:")):
        lowering.setdefault(tag, _DENSE)
    for tag, lowered in sorted(lowering.items()):
        if not lowered.possible:
            raise recipe.document.error(
                f"{recipe.backend.name} cannot run {tag} ({lowered.reason})",
                "backend",
                remedy="choose another backend or another format; optkit plugins list shows what is installed",
            )
    return lowering


def _check_batching(recipe: Recipe) -> None:
    """Refuse a strategy that nobody would ask: the runtime batches by itself."""
    batching = recipe.batching
    # A resolved recipe has the default written out.
    usual = batching.name == RecipeKeys.model_fields["batching"].default
    if recipe.backend.options.own_batch_size is None or (usual and batching.options == type(batching.options)()):
        return
    raise recipe.document.error(
        f"{recipe.backend.name} batches by itself and takes no batching strategy",
        "batching",
        found=batching.name,
        remedy=f"remove it; the options of {recipe.backend.name} say how many sequences run at once",
    )


def _limits(recipe: Recipe, card: ModelCard, task: AnyTask) -> Limits:
    needed = task.positions(recipe)
    length = recipe.max_length or min(card.max_length, max(2048, needed))
    if length > card.max_length:
        raise recipe.document.error(
            f"the model was trained for {card.max_length} positions",
            "max_length",
            found=length,
            remedy="lower max_length",
        )
    if needed > card.max_length:
        raise recipe.document.error(
            f"evaluation and benchmark need {needed} positions, the model was trained for {card.max_length}",
            remedy="lower evaluation.context_length, or benchmark's prompt_tokens and output_tokens",
        )
    if length < needed:
        raise recipe.document.error(
            f"evaluation and benchmark need {needed} positions",
            "max_length",
            found=length,
            remedy="raise max_length, or lower evaluation.context_length and benchmark's tokens",
        )
    if recipe.kv_cache_tokens is not None and recipe.kv_cache_tokens < length:
        raise recipe.document.error(
            f"one sequence takes up to {length} tokens",
            "kv_cache_tokens",
            found=recipe.kv_cache_tokens,
            remedy="raise it, or lower max_length",
        )
    sequences = recipe.backend.options.own_batch_size or recipe.batching.options.max_sequences
    return Limits(sequences, length, recipe.kv_cache_tokens)


def _estimate(
    recipe: Recipe,
    card: ModelCard,
    limits: Limits,
    task: AnyTask,
    steps: tuple[PlannedStep, ...],
) -> Estimate:
    floats = card.parameters * _FLOAT
    stored, bits, largest, work = floats, 8.0 * _FLOAT, floats, 0
    for use, step in zip(recipe.transforms, steps, strict=True):
        bits = use.options.bits_per_weight(step.card) or bits
        stored = round(step.card.parameters * bits / 8)
        largest = max(largest, step.card.parameters * _FLOAT)
        work = max(work, use.options.work_bytes(step.card))
    last, tags = (steps[-1].card, steps[-1].tags) if steps else (card, card.tags)
    token_seconds = _token_seconds(card)
    quantized = 1 if any(tag.startswith("kv:") for tag in tags) else _FLOAT
    cached = 2 if BFLOAT16_CACHE.tag in tags else quantized
    measuring = task.demand(recipe, card, limits, token_seconds, cached)
    # The baseline stays loaded beside the model that is worked on.
    memory = floats + largest + max(work, measuring.memory_bytes + recipe.backend.options.runtime_bytes(last, stored))
    disk = measuring.disk_bytes + (len(recipe.transforms) + 1) * stored + 2 * (stored + stored)
    evaluation = (2 + len(recipe.transforms)) * measuring.evaluation_tokens * token_seconds
    tokens = measuring.calibration_tokens
    learning = sum(use.options.forward_passes() for use in recipe.transforms) * tokens * token_seconds
    memory += 2 * tokens * card.hidden_size * _FLOAT
    disk += 2 * tokens * card.hidden_size * _FLOAT
    seconds = 20 + learning + evaluation + measuring.benchmark_seconds + disk / 0.5e9
    return Estimate(memory, disk, stored, seconds)


def _token_seconds(card: ModelCard) -> float:
    measured = hardware.peaks()
    gflops = measured.fp32_gflops if measured is not None and measured.fp32_gflops else hardware.quick_gflops()
    return 2 * card.parameters / (gflops * 1e9 * _EFFICIENCY)


def _preflight(estimate: Estimate) -> None:
    available = hardware.memory().available
    if estimate.memory_bytes > available:
        raise MachineError(
            f"apply needs about {size(estimate.memory_bytes)} of memory, {size(available)} are available",
            remedy="lower evaluation.context_length, max_length or max_batch_size, or take a larger machine",
        )
    root = cache_root()
    free = shutil.disk_usage(next(path for path in [root, *root.parents] if path.exists())).free
    if estimate.disk_bytes > free:
        raise MachineError(
            f"apply writes about {size(estimate.disk_bytes)}, {size(free)} are free",
            where=str(root),
            remedy="optkit cache clear frees old steps, OPTKIT_CACHE names another place",
        )


def _shown(tags: frozenset[str]) -> str:
    return ", ".join(sorted(tag for tag in tags if not tag.startswith(("task:", "arch:")))) or "none of these"


def check_output(output: Path, recipe_hash: str, *, overwrite: bool) -> bool:
    """Whether an artifact of this very recipe stands at `output` already.

    Raises:
        RecipeError: something else stands there, and it may not be overwritten.
        DamagedError: an artifact stands there, damaged.
    """
    from optkit.artifact import open_artifact

    if not output.exists():
        return False
    where, remedy = str(output), "choose another --output, or add --overwrite"
    if not (output / "manifest.json").is_file():
        if output.is_dir() and not any(output.iterdir()):
            return False
        raise RecipeError("is there already, and no artifact", where=where, remedy="choose another --output")
    if overwrite:
        return False
    try:
        found = open_artifact(output).manifest.recipe_hash
    except DamagedError as error:
        raise DamagedError(error.what, where=error.where, remedy="add --overwrite to make it anew") from error
    if found != recipe_hash:
        raise RecipeError("holds the artifact of another recipe", where=where, remedy=remedy)
    return True


def check_room(output: Path, estimate: Estimate) -> None:
    """Refuse, before the work, to publish what does not fit.

    Raises:
        MachineError: the disk of `output` has less room than the artifact takes.
    """
    needed = 2 * estimate.weight_bytes  # weights and runtime
    free = shutil.disk_usage(next(path for path in output.parents if path.exists())).free
    if needed > free:
        raise MachineError(
            f"the artifact takes about {size(needed)}, {size(free)} are free",
            where=str(output),
            remedy="choose another output",
        )
