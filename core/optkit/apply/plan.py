"""What a recipe will do on this machine, or the first thing wrong with it. Reads no weights, imports no runtime."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from optkit import hardware
from optkit.backends import Backend, Lowering
from optkit.errors import MachineError, MissingError, RecipeError
from optkit.locations import cache_root
from optkit.model import ModelCard
from optkit.plugins import Plugins
from optkit.recipe import Recipe
from optkit.steps import Limits
from optkit.transforms import Transform

__all__ = ["Estimate", "Plan", "PlannedStep", "make_plan"]

_FLOAT = 4
# Of what the GEMM probe reaches: a whole model also normalizes, attends and dispatches.
_EFFICIENCY = 0.5
# Python and dispatch per layer and token of an eager transformers model, in seconds.
_EAGER_LAYER_SECONDS = 1.5e-3


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A transform with the tags of the model after it."""

    name: str
    tags: frozenset[str]


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
    card: ModelCard
    steps: tuple[PlannedStep, ...]
    lowering: dict[str, Lowering]
    limits: Limits
    estimate: Estimate

    @property
    def tags(self) -> frozenset[str]:
        """Of the model that the backend gets."""
        return self.steps[-1].tags if self.steps else self.card.tags


def make_plan(recipe: Recipe, plugins: Plugins) -> Plan:
    """Check everything that can be checked before the work.

    Raises:
        RecipeError: steps in an order that cannot work, options that do not fit the model, or a weight format that the
            backend cannot run; with position and remedy.
        MissingError: the model, or what the backend needs, is not on this machine.
        MachineError: too little memory or disk.
    """
    _check_gates(recipe, plugins)
    card = _inspect(recipe)
    steps = _fold(recipe, card)
    tags = steps[-1].tags if steps else card.tags
    lowering = _lower(recipe, tags)
    limits = _limits(recipe, card)
    estimate = _estimate(recipe, card, limits)
    _preflight(estimate)
    return Plan(recipe, card, steps, lowering, limits, estimate)


def _inspect(recipe: Recipe) -> ModelCard:
    try:
        return recipe.model.options.inspect()
    except MissingError as error:
        where = recipe.document.where("model", recipe.model.name)
        raise MissingError(
            f"{error.where}: {error.what}", where=where, found=error.found, remedy=error.remedy
        ) from error


def _check_gates(recipe: Recipe, plugins: Plugins) -> None:
    for index, gate in enumerate(recipe.gates):
        metric = plugins.get("metric", gate.metric, where=recipe.document.where("gates", index, "metric"))
        if gate.limit.kind == "ratio" and not metric.relative:
            raise recipe.document.error(
                f"{gate.metric} has no ratio to the baseline, it is a distance from it",
                "gates",
                index,
                remedy="give a plain number as the limit",
            )


def _fold(recipe: Recipe, card: ModelCard) -> tuple[PlannedStep, ...]:
    tags = card.tags
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
            causes = [step.name for step in steps if clash[0] in step.tags] or [f"the model {card.name}"]
            raise recipe.document.error(
                f"cannot come after {causes[0]}, which leaves the model with {clash[0]}",
                *place,
                remedy="put it before that step, or leave one of them out",
            )
        try:
            transform.check(card)
        except RecipeError as error:
            raise recipe.document.error(error.what, *place, found=error.found, remedy=error.remedy) from error
        tags = tags | transform.provides()
        steps.append(PlannedStep(use.name, tags))
    return tuple(steps)


def _lower(recipe: Recipe, tags: frozenset[str]) -> dict[str, Lowering]:
    backend: Backend = recipe.backend.options
    missing = backend.unavailable()
    if missing is not None:
        raise MissingError(f"backend {recipe.backend.name!r} {missing}", where=recipe.document.where("backend"))
    lowering = dict(backend.lowering(tags))
    for tag in sorted(tag for tag in tags if tag.startswith("weights:")):
        lowering.setdefault(
            tag, Lowering("", native=False, reason=f"{recipe.backend.name} has no kernel for this format")
        )
    for tag, lowered in sorted(lowering.items()):
        if not lowered.possible:
            raise recipe.document.error(
                f"{recipe.backend.name} cannot run {tag} ({lowered.reason})",
                "backend",
                remedy="choose another backend or another format; optkit plugins list shows what is installed",
            )
    return lowering


def _limits(recipe: Recipe, card: ModelCard) -> Limits:
    needed = max(recipe.benchmark.prompt_tokens + recipe.benchmark.output_tokens, recipe.evaluation.context_length)
    length = recipe.max_length or min(card.max_length, max(2048, needed))
    if length > card.max_length:
        raise recipe.document.error(
            f"the model was trained for {card.max_length} positions",
            "max_length",
            found=length,
            remedy="lower max_length",
        )
    if length < needed:
        raise recipe.document.error(
            f"evaluation and benchmark need {needed} positions",
            "max_length",
            found=length,
            remedy="raise max_length, or lower evaluation.context_length and benchmark's tokens",
        )
    return Limits(recipe.batching.options.max_sequences, length)


def _estimate(recipe: Recipe, card: ModelCard, limits: Limits) -> Estimate:
    floats = card.parameters * _FLOAT
    stored = floats
    for use in recipe.transforms:
        bits = use.options.bits_per_weight(card)
        stored = stored if bits is None else round(card.parameters * bits / 8)
    cache = limits.max_batch_size * limits.max_length * card.kv_values_per_token * _FLOAT
    window = recipe.evaluation.context_length * card.vocab_size * _FLOAT
    # The baseline stays loaded beside the model that is worked on; logits of a window exist three times in a metric.
    memory = 2 * floats + 3 * window + cache + recipe.backend.options.runtime_bytes(card, stored)
    recorded = recipe.evaluation.tokens * card.vocab_size * _FLOAT
    disk = recorded + (len(recipe.transforms) + 1) * stored + 2 * (stored + stored)
    return Estimate(memory, disk, stored, _seconds(recipe, card, disk))


def _seconds(recipe: Recipe, card: ModelCard, disk: int) -> float:
    measured = hardware.peaks()
    gflops = measured.fp32_gflops if measured is not None and measured.fp32_gflops else hardware.quick_gflops()
    per_token = 2 * card.parameters / (gflops * 1e9 * _EFFICIENCY)
    passes = 2 + sum(1 for _ in recipe.transforms)
    evaluation = passes * recipe.evaluation.tokens * per_token
    decode = card.parameters * _FLOAT / 10e9 + card.layers * _EAGER_LAYER_SECONDS
    generation = recipe.benchmark.prompt_tokens * per_token + recipe.benchmark.output_tokens * decode
    # Two runs a block for the baseline, and about half as long again for both arms of the optimized model.
    benchmark = 3 * recipe.benchmark.blocks * generation
    return 20 + evaluation + benchmark + disk / 0.5e9


def _preflight(estimate: Estimate) -> None:
    available = hardware.memory().available
    if estimate.memory_bytes > available:
        raise MachineError(
            f"apply needs about {estimate.memory_bytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available",
            remedy="lower evaluation.context_length, max_length or max_batch_size, or take a larger machine",
        )
    root = cache_root()
    free = shutil.disk_usage(next(path for path in [root, *root.parents] if path.exists())).free
    if estimate.disk_bytes > free:
        raise MachineError(
            f"apply writes about {estimate.disk_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            where=str(root),
            remedy="optkit cache clear frees old steps, OPTKIT_CACHE names another place",
        )


def _shown(tags: frozenset[str]) -> str:
    return ", ".join(sorted(tag for tag in tags if not tag.startswith(("task:", "arch:")))) or "none of these"


def check_output(output: Path, recipe_hash: str, *, overwrite: bool) -> bool:
    """Whether an artifact of this very recipe stands at `output` already.

    Raises:
        RecipeError: something else stands there, and it may not be overwritten.
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
    if open_artifact(output).manifest.recipe_hash != recipe_hash:
        raise RecipeError("holds the artifact of another recipe", where=where, remedy=remedy)
    return True
