"""From a plan to a published artifact, step by step through the cache."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from optkit import hardware, measure
from optkit.apply.cache import CachedStep, StepCache, key_of, locked, sweep, workplace
from optkit.apply.gates import check_gates
from optkit.apply.plan import Plan, check_output, check_room
from optkit.apply.report import render_html
from optkit.apply.workshop import Workshop
from optkit.artifact import Artifact, StepRecord, open_artifact, publish, staging, writing
from optkit.backends import AnySession
from optkit.bench import Opening, arm_of_model, arm_of_session
from optkit.calibration import Calibration
from optkit.datasets import Dataset
from optkit.errors import GateFailed
from optkit.measure import Contestant
from optkit.metrics import FootprintMetric, Metric
from optkit.model import Model
from optkit.opening import Files
from optkit.plugins import Plugins
from optkit.recipe import Use
from optkit.schemes import SHAPES_ENTRY
from optkit.transforms import TransformContext
from optkit.weights import save_folder
from optkit.weights.compressed import quantizes_convolutions

__all__ = ["Outcome", "Progress", "apply"]

Progress = Callable[[str, int, int, str], None]
"""`progress(step, done, total, what)`, called at least once a second in long work."""

log = logging.getLogger(__name__)


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
    for each other; two that share a step do it once. An observer that raises is named in a warning of this module's
    logger, and the work goes on without it.

    Raises:
        RecipeError: `output` holds something else.
        DamagedError: `output` holds a damaged artifact.
        GateFailed: a gate of the recipe, or parity, is missed; the artifact stands at `output` + `.rejected`.
        MachineError: the output or the cache cannot be written.
    """
    output = output.resolve()  # two spellings of one place are one output, and a link to it stays a link
    recipe = plan.recipe
    source = key_of(model=_identity(recipe.model), files=recipe.model.options.fingerprint())
    data = _key_of_data(recipe.evaluation.dataset)
    calibration = "" if recipe.calibration is None else _key_of_data(recipe.calibration.dataset)
    uses: list[Use[Any]] = [*recipe.transforms, recipe.backend, recipe.batching]
    plugins_used = [_identity(use) for use in uses]
    recipe_hash = key_of(
        recipe=recipe.resolved(), plugins=plugins_used, source=source, data=data, calibration=calibration
    )
    place = key_of(output=str(output))
    with locked(place):
        if check_output(output, recipe_hash, overwrite=overwrite):
            artifact = open_artifact(output)
            return Outcome(artifact, artifact.report(), (), existed=True)
        check_room(output, plan.estimate)
        sweep()
        with staging(output) as staged, workplace(place) as scratch:
            steps = _Steps(plan, plugins, Workshop(plan, scratch), source, data, calibration, progress)
            for index in range(len(recipe.transforms)):
                steps.transform(index)
            report = steps.finish()
            with writing(output, remedy="choose another output"):
                steps.assemble(staged, report)
            failed = [gate for gate in report["gates"] if not gate["passed"]]
            target = output.with_name(output.name + ".rejected") if failed else output
            artifact = publish(staged, target, steps.facts(recipe_hash))
    if failed:
        messages = "; ".join(gate["message"] for gate in failed)
        raise GateFailed(messages, where=str(output), remedy=f"the artifact was kept aside at {target}")
    return Outcome(artifact, report, tuple(steps.done), existed=False)


class _Steps:
    """The steps of one apply, each through the cache."""

    def __init__(
        self,
        plan: Plan,
        plugins: Plugins,
        shop: Workshop,
        source: str,
        data: str,
        calibration: str,
        progress: Progress,
    ) -> None:
        self.done: list[CachedStep] = []
        self._plan, self._plugins, self._shop, self._progress = plan, plugins, shop, progress
        self._recipe, self._resolved, self._task = plan.recipe, plan.recipe.resolved(), plan.task
        self._source = self._key = source
        self._machine = hardware.machine()
        judged: dict[str, Any] = {
            "source": source,
            "data": data,
            "evaluation": {**self._resolved["evaluation"], "context_length": shop.longest},
        }
        # What is learnt from depends on what is judged by: they share nothing.
        self._learnt_from = {"calibration": calibration, "asked": self._resolved["calibration"], **judged}
        self._judged_by = {**judged, "metrics": self._metrics(self._task.quality_metric)}
        self._cache = StepCache()
        self._records: list[StepRecord] = []
        self._weights: Path | None = None
        self._tags = plan.card.tags

    def transform(self, index: int) -> None:
        """Apply one transform, and measure what it does to quality and size."""
        use, before, tags = self._recipe.transforms[index], self._weights, self._tags
        name = f"{index + 1} {use.name}"
        made: list[Model] = []

        inputs: dict[str, Any] = {"model": self._key}
        device = hardware.accelerator() if use.options.calibration else "cpu"
        if use.options.calibration:
            inputs |= {"device": device, **self._learnt_from}
        if use.options.baseline:
            inputs["baseline"] = self._source

        def work(directory: Path) -> dict[str, Any]:
            context = TransformContext(
                partial(self._progress, name),
                self._shop.calibration if use.options.calibration else Calibration(),
                self._cache.checkpoint(self._key_of(name, use, inputs)),
                device,
                self._shop.baseline if use.options.baseline else None,
            )
            model = use.options.apply(self._shop.take(before, tags), context)
            save_folder(model, directory)
            made.append(model)
            sizes = {"weight_bytes": measure.folder_bytes(directory)}
            if any(tag.startswith("sparsity:") for tag in model.tags):
                sizes["compressed_bytes"] = measure.compressed_bytes(directory)
            return {"tags": sorted(model.tags), **sizes}

        changed = self._step(name, use, work, inputs)
        self._key, self._weights, self._tags = changed.key, changed.data, frozenset(changed.report["tags"])
        for model in made:
            self._shop.keep(self._weights, model)
        inputs = {"model": self._key, **self._judged_by}
        judged = f"{name}: quality"
        effect = self._step(judged, self._recipe.evaluation.dataset, partial(self._effect, judged), inputs)
        sizes = {name: value for name, value in changed.report.items() if name.endswith("_bytes")}
        self._record(use, changed, {**effect.report, **sizes})

    def finish(self) -> dict[str, Any]:
        """Compile, open, and measure against the baseline: parity, quality, speed, footprint. Then judge.

        Returns:
            The contents of `report.json`.
        """
        recipe = self._recipe
        if self._weights is None:
            saved = self._step("save weights", recipe.model, self._save, {"model": self._key})
            self._key, self._weights = saved.key, saved.data
        compiled = self._step("compile", recipe.backend, self._compile, {"model": self._key})
        self._record(recipe.backend, compiled, {})
        self._files = Files(compiled.data, self._weights, self._plan.limits)
        inputs = {"compiled": compiled.key, "limits": asdict(self._plan.limits), **self._judged_by}
        quality = self._step("quality", recipe.evaluation.dataset, self._quality, inputs)
        inputs |= {"benchmark": self._resolved["benchmark"], "machine": self._machine.fingerprint()}
        inputs["metrics"] = self._metrics(self._task.speed_metric, FootprintMetric)
        speed = self._step("benchmark", recipe.batching, self._speed, inputs)
        figures = {**speed.report["metrics"], **quality.report["metrics"]}
        parity, lowering = quality.report["parity"], self._plan.lowering
        gates = check_gates(recipe.gates or (), figures, lowering, parity, self._task.output)
        return {
            "name": recipe.name,
            "metrics": figures,
            "parity": parity,
            "gates": [asdict(gate) for gate in gates],
            "lowering": {tag: asdict(lowered) for tag, lowered in lowering.items()},
            "steps": [record.model_dump() for record in self._records],
            "machine": asdict(self._machine),
            "measured": speed.report["measured"],
            "samples": speed.report["samples"],
        }

    def assemble(self, staged: Path, report: Mapping[str, Any]) -> None:
        """Put everything but the manifest into `staged`."""
        # Not with the modes that libraries gave the files: who may read the artifact is up to this user's umask.
        shutil.copytree(self._files.weights, staged / "weights", copy_function=shutil.copyfile)
        shutil.copytree(self._files.runtime, staged / "runtime", copy_function=shutil.copyfile)
        (staged / "recipe.yaml").write_text(self._recipe.document.text, encoding="utf-8")
        (staged / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (staged / "report.html").write_text(render_html(report), encoding="utf-8")

    def facts(self, recipe_hash: str) -> dict[str, Any]:
        """The fields of the manifest."""
        pipeline = (self._files.weights / "modules.json").is_file()
        # sentence-transformers calls `forward` past the hooks in which compressed-tensors rounds activations, and finds
        # several weight formats only there.
        rounded = any(tag.startswith("activations:") for tag in self._tags)
        formats = [tag for tag in self._tags if tag.startswith("weights:") and tag != "weights:float"]
        pipeline = pipeline and not rounded and len(formats) < 2
        # Neither knows layers of several shapes, or a format for convolutions.
        config = json.loads((self._files.weights / "config.json").read_text(encoding="utf-8"))
        known = SHAPES_ENTRY not in config and not quantizes_convolutions(config)
        others = ["transformers", *(["sentence-transformers"] if pipeline else [])] if known else []
        return {
            "name": self._recipe.name,
            "recipe": self._resolved,
            "recipe_hash": recipe_hash,
            "tags": sorted(self._tags),
            "max_batch_size": self._plan.limits.max_batch_size,
            "max_length": self._plan.limits.max_length,
            "kv_cache_tokens": self._plan.limits.kv_cache_tokens,
            "steps": self._records,
            "servable_by": ["optkit", *others],
            "machine": asdict(self._machine),
        }

    # --- what the steps do

    def _effect(self, name: str, _: Path) -> dict[str, Any]:
        model = self._shop.take(self._weights, self._tags)
        progress, candidate = partial(self._progress, name), self._task.scorer(model)
        figures = measure.quality(
            self._task, self._shop.baseline_scorer, candidate, self._shop.data, self._plugins, progress
        )
        self._keep(model)
        return {"metrics": figures}

    def _save(self, directory: Path) -> dict[str, Any]:
        save_folder(self._shop.baseline, directory)
        return {"tags": sorted(self._tags), "weight_bytes": measure.folder_bytes(directory)}

    def _compile(self, directory: Path) -> dict[str, Any]:
        model = self._shop.take(self._weights, self._tags)
        self._recipe.backend.options.compile(model, directory)
        self._keep(model)
        return {"runtime_bytes": measure.folder_bytes(directory)}

    def _quality(self, _: Path) -> dict[str, Any]:
        model = self._shop.take(self._weights, self._tags)
        tolerance = max(lowered.tolerance for lowered in self._plan.lowering.values())
        with self._open() as session:
            candidate, data = self._task.scorer_of_session(session, self._files.weights), self._shop.data
            distance = self._task.parity(self._task.scorer(model), candidate, data)
            del model  # before the evaluation: nobody needs it any more
            progress = partial(self._progress, "quality")
            baseline = self._shop.baseline_scorer
            figures = measure.quality(self._task, baseline, candidate, data, self._plugins, progress)
        return {"metrics": figures, "parity": {"distance": distance, "tolerance": tolerance}}

    def _speed(self, _: Path) -> dict[str, Any]:
        recipe, data, settings = self._recipe, self._shop.data, self._recipe.benchmark
        card, files, name = self._plan.card, self._files, measure.OPTIMIZED
        size = measure.folder_bytes(files.runtime) or measure.folder_bytes(files.weights)
        contestants = (
            Contestant(measure.BASELINE, Opening(self._resolved, None), card.parameters * card.bytes_per_parameter),
            Contestant(name, Opening(self._resolved, files), size),
        )
        told = partial(self._progress, "memory")
        footprint = measure.footprints(self._task, contestants, data, settings, self._plugins, told)
        arms = (
            arm_of_model(self._shop.baseline, measure.BASELINE),
            arm_of_session(self._open(), recipe.batching.options, files, name),
        )
        told = partial(self._progress, "benchmark")
        speed, samples = measure.speed(self._task, arms, data, settings, self._plugins, told)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {"metrics": {**footprint[name], **speed[name]}, "measured": now, "samples": samples}

    # --- what they share

    def _open(self) -> AnySession:
        files = self._files
        return self._recipe.backend.options.open(files.runtime, files.weights, files.limits)

    def _keep(self, model: Model) -> None:
        assert self._weights is not None
        self._shop.keep(self._weights, model)

    def _step(
        self, name: str, use: Use[Any], work: Callable[[Path], dict[str, Any]], inputs: Mapping[str, Any]
    ) -> CachedStep:
        """One step through the cache; observers hear of it. The libraries' versions are part of every key."""
        key = self._key_of(name, use, inputs)
        self._tell("step_started", step=name)
        self._progress(name, 0, 1, "")
        step = self._cache.run(key, name, work)
        self._progress(name, 1, 1, "cached" if step.hit else f"{step.seconds:.1f} s")
        report = {"key": key, "seconds": step.seconds, "cached": step.hit, **step.report}
        self._tell("step_finished", step=name, report=report)
        self.done.append(step)
        return step

    def _key_of(self, name: str, use: Use[Any], inputs: Mapping[str, Any]) -> str:
        return key_of(step=name, plugin=_identity(use), libraries=self._machine.libraries, inputs=inputs)

    def _tell(self, event: str, **facts: Any) -> None:
        """Call every observer, each with copies: what one of them does reaches neither the others nor the work."""
        for observer in getattr(self._plugins.hook, event).get_hookimpls():
            try:
                observer.function(*(copy.deepcopy(facts[name]) for name in observer.argnames))
            except Exception as error:
                log.warning(
                    "plugin %r failed when it was told of %s (%s: %s)",
                    observer.plugin_name,
                    facts["step"],
                    type(error).__name__,
                    error,
                )

    def _metrics(self, *shapes: type[Metric]) -> list[tuple[str, str, str]]:
        """What measures: a metric that was installed or upgraded since has no figure in the cache."""
        names = sorted(name for shape in shapes for name in measure.metrics_of(self._plugins, shape))
        offers = [self._plugins.find("metric", name) for name in names]
        return [(offer.name, offer.distribution, offer.version) for offer in offers]

    def _record(self, use: Use[Any], step: CachedStep, effect: Mapping[str, Any]) -> None:
        self._records.append(
            StepRecord(
                step=step.name,
                distribution=use.distribution,
                version=use.version,
                options=use.resolved()[use.name],
                key=step.key,
                seconds=step.seconds,
                effect=dict(effect),
            )
        )


def _identity(use: Use[Any]) -> dict[str, Any]:
    """What of a plugin decides its result: where it comes from, in which version, and its options."""
    return {"plugin": use.resolved(), "distribution": use.distribution, "version": use.version}


def _key_of_data(use: Use[Dataset]) -> str:
    return key_of(dataset=_identity(use), data=use.options.fingerprint())
