"""What the steps of one apply share: the models, loaded when a step first needs them, and the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optkit.apply.plan import Plan
from optkit.calibration import Calibration
from optkit.model import Model
from optkit.weights import load_folder

__all__ = ["Workshop"]


class Workshop:
    """Holds the baseline and the model that is worked on. A step that the cache answers needs neither.

    Args:
        plan: says where the baseline and the data come from.
        scratch: an empty directory for this run alone; the baseline's answers are kept there.
    """

    def __init__(self, plan: Plan, scratch: Path) -> None:
        self._recipe, self._card, self._task = plan.recipe, plan.card, plan.task
        self.longest = min(plan.recipe.evaluation.context_length, plan.limits.max_length)
        """Tokens of one piece of text at most."""
        self._scratch = scratch
        self._baseline: Model | None = None
        self._model: tuple[Path | None, Model] | None = None
        self._data: Any = None
        self._calibration: Calibration | None = None
        self._scorer: Any = None

    @property
    def baseline(self) -> Model:
        """The unoptimized model. Nobody changes it."""
        if self._baseline is None:
            self._baseline = self._recipe.model.options.load()
        return self._baseline

    @property
    def baseline_scorer(self) -> Any:
        """What answers for the baseline: computed once and then remembered."""
        if self._scorer is None:
            self._scorer = self._task.recorded(self._task.scorer(self.baseline), self._scratch)
        return self._scorer

    @property
    def data(self) -> Any:
        """What models are judged on, as their task has it."""
        if self._data is None:
            reader, settings = self._task.reader(self.baseline), self._recipe.evaluation
            self._data = self._task.data(reader, settings.dataset.options, settings, self.longest)
        return self._data

    @property
    def calibration(self) -> Calibration:
        """What transforms run the model on: nothing that evaluation uses."""
        if self._calibration is None:
            asked = self._recipe.calibration
            assert asked is not None
            reader = self._task.reader(self.baseline)
            self._calibration = self._task.calibration(reader, asked, self._card, self.data)
        return self._calibration

    def take(self, weights: Path | None, tags: frozenset[str]) -> Model:
        """The model of a weights folder, or a fresh baseline for None, to be changed in place by the caller."""
        held, self._model = self._model, None
        if held is not None and held[0] == weights:
            return held[1]
        del held  # before the next one is loaded: two of them may not fit
        return self._recipe.model.options.load() if weights is None else load_folder(weights, tags=tags)

    def keep(self, weights: Path, model: Model) -> None:
        """Remember the model that was just saved to `weights`, so that the next step need not load it.

        One in another precision is not remembered: saved, it flows on in float32, as after an interruption.
        """
        import torch

        floats = (tensor for tensor in model.module.state_dict().values() if tensor.is_floating_point())
        if all(tensor.dtype == torch.float32 for tensor in floats):
            self._model = (weights, model)
