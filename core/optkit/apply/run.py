"""From a plan to a published artifact, step by step through the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from optkit import hardware
from optkit.apply import measure
from optkit.apply.cache import CachedStep, StepCache, key_of, locked
from optkit.apply.gates import check_gates
from optkit.apply.plan import Plan, check_output
from optkit.apply.report import render_html
from optkit.apply.workshop import Workshop, workshop
from optkit.artifact import Artifact, StepRecord, open_artifact, publish, staging
from optkit.errors import GateFailed
from optkit.plugins import Plugins
from optkit.recipe import Use
from optkit.transforms import TransformContext
from optkit.weights import save_folder

__all__ = ["Outcome", "Progress", "apply"]

Progress = Callable[[str, int, int, str], None]
"""`progress(step, done, total, what)`, called at least once a second in long work."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an apply came to."""

    artifact: Artifact
    report: Mapping[str, Any]
    steps: tuple[CachedStep, ...]
    existed: bool
    """Whether the artifact of this very recipe was there already, so that nothing had to be done."""


def apply(plan: Plan, plugins: Plugins, output: Path, *, progress: Progress, overwrite: bool = False) -> Outcome:
    """Carry out a plan and publish the artifact at `output`.

    Every step goes through the cache, so that an interrupted apply goes on where it was. Two applies to one output wait
    for each other; two that share a step do it once.

    Raises:
        RecipeError: `output` holds something else.
        GateFailed: a gate of the recipe, or parity, is missed; the artifact stands at `output` + `.rejected`.
        MachineError: the output or the cache cannot be written.
    """
    output = output.absolute()
    source = key_of(model=_identity(plan.recipe.model), files=plan.recipe.model.options.fingerprint())
    recipe_hash = key_of(recipe=plan.recipe.resolved(), source=source)
    with locked(key_of(output=str(output))):
        if check_output(output, recipe_hash, overwrite=overwrite):
            artifact = open_artifact(output)
            return Outcome(artifact, artifact.report(), (), existed=True)
        with staging(output) as staged, workshop(plan.recipe) as shop:
            steps = _Steps(plan, plugins, shop, source, progress)
            for index in range(len(plan.recipe.transforms)):
                steps.transform(index)
            report = steps.finish()
            steps.assemble(staged, report)
            failed = [gate for gate in report["gates"] if not gate["passed"]]
            target = output.with_name(output.name + ".rejected") if failed else output
            artifact = publish(staged, target, steps.facts(recipe_hash))
    if failed:
        raise GateFailed(failed[0]["message"], where=str(output), remedy=f"the artifact was kept aside at {target}")
    return Outcome(artifact, report, tuple(steps.done), existed=False)


class _Steps:
    """The steps of one apply, each through the cache."""

    def __init__(self, plan: Plan, plugins: Plugins, shop: Workshop, source: str, progress: Progress) -> None:
        self.done: list[CachedStep] = []
        self._plan, self._plugins, self._shop, self._progress = plan, plugins, shop, progress
        self._recipe = plan.recipe
        self._cache = StepCache()
        self._records: list[StepRecord] = []
        self._source = source
        self._key = key_of(source=source, libraries=hardware.libraries())
        self._weights: Path | None = None
        self._tags = plan.card.tags

    def transform(self, index: int) -> None:
        """Apply one transform, and measure what it does to quality and size."""
        use = self._recipe.transforms[index]
        name = f"{index + 1} {use.name}"
        changed = self._step(name, use, partial(self._transform, use, name), {"before": self._key})
        self._key, self._weights, self._tags = changed.key, changed.data, frozenset(changed.report["tags"])
        setting = {"model": self._key, "evaluation": self._recipe.resolved()["evaluation"], "source": self._source}
        effect = self._step(f"{name}: quality", self._recipe.evaluation.dataset, self._effect, setting)
        self._record(use, changed, {**effect.report, "weight_bytes": changed.report["weight_bytes"]})

    def finish(self) -> dict[str, Any]:
        """Compile, open, and measure against the baseline: parity, quality, speed, footprint. Then judge."""
        recipe, limits = self._recipe, asdict(self._plan.limits)
        if self._weights is None:
            saved = self._step("save weights", recipe.model, self._save, {"before": self._key})
            self._key, self._weights = saved.key, saved.data
        compiled = self._step("compile", recipe.backend, self._compile, {"model": self._key})
        self._record(recipe.backend, compiled, {})
        self._runtime = compiled.data
        base = {"compiled": compiled.key, "limits": limits, "source": self._source}
        resolved = recipe.resolved()
        quality = self._step(
            "quality", recipe.evaluation.dataset, self._quality, {**base, "evaluation": resolved["evaluation"]}
        )
        speed = self._step(
            "benchmark",
            recipe.batching,
            self._speed,
            {**base, "benchmark": resolved["benchmark"], "machine": hardware.machine().fingerprint()},
        )
        figures = {**quality.report["metrics"], **speed.report["metrics"]}
        parity = quality.report["parity"]
        return {
            "name": recipe.name,
            "metrics": figures,
            "parity": parity,
            "gates": [asdict(gate) for gate in check_gates(recipe.gates, figures, self._plan.lowering, parity)],
            "lowering": {tag: asdict(lowered) for tag, lowered in self._plan.lowering.items()},
            "steps": [record.model_dump() for record in self._records],
            "machine": hardware.machine().facts(),
            "samples": speed.report["samples"],
        }

    def assemble(self, staged: Path, report: Mapping[str, Any]) -> None:
        """Put everything but the manifest into `staged`."""
        assert self._weights is not None
        shutil.copytree(self._weights, staged / "weights")
        shutil.copytree(self._runtime, staged / "runtime")
        (staged / "recipe.yaml").write_text(self._recipe.document.text, encoding="utf-8")
        (staged / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (staged / "report.html").write_text(render_html(report), encoding="utf-8")

    def facts(self, recipe_hash: str) -> dict[str, Any]:
        """The fields of the manifest."""
        return {
            "name": self._recipe.name,
            "recipe": self._recipe.resolved(),
            "recipe_hash": recipe_hash,
            "tags": sorted(self._tags),
            "max_batch_size": self._plan.limits.max_batch_size,
            "max_length": self._plan.limits.max_length,
            "steps": self._records,
            "servable_by": ["optkit", "transformers", "vllm"],
            "machine": hardware.machine().facts(),
        }

    def _step(self, name: str, use: Use[Any], work: Callable[[Path], dict[str, Any]], inputs: Mapping[str, Any]) -> CachedStep:
        """One step through the cache; observers hear of it. The libraries' versions are part of every key."""
        key = key_of(step=name, plugin=_identity(use), libraries=hardware.libraries(), **inputs)
        self._plugins.hook.step_started(step=name)
        self._progress(name, 0, 1, "")
        step = self._cache.run(key, name, work)
        self._progress(name, 1, 1, "cached" if step.hit else f"{step.seconds:.1f} s")
        self._plugins.hook.step_finished(
            step=name, report={"key": key, "seconds": step.seconds, "cached": step.hit, **step.report}
        )
        self.done.append(step)
        return step

    def _record(self, use: Use[Any], step: CachedStep, effect: Mapping[str, Any]) -> None:
        self._records.append(
            StepRecord(step=step.name, key=step.key, seconds=step.seconds, effect=dict(effect), **_identity(use))
        )

    # --- what the steps do

    def _transform(self, use: Use[Any], name: str, directory: Path) -> dict[str, Any]:
        model = self._shop.take(self._weights, self._tags)
        model = use.options.apply(model, TransformContext(partial(self._progress, name)))
        save_folder(model, directory)
        self._shop.keep(self._cache.place(directory), model)
        return {"tags": sorted(model.tags), "weight_bytes": measure.folder_bytes(directory)}

    def _save(self, directory: Path) -> dict[str, Any]:
        save_folder(self._shop.baseline, directory)
        return {"tags": sorted(self._tags), "weight_bytes": measure.folder_bytes(directory)}

    def _effect(self, _: Path) -> dict[str, Any]:
        raise NotImplementedError
