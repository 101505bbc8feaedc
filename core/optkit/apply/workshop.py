"""What the steps of one apply share: the models, loaded when a step first needs them, and the evaluation text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optkit.apply.data import calibration_length
from optkit.apply.plan import Plan
from optkit.calibration import Calibration
from optkit.evaluate import held_out
from optkit.model import Model
from optkit.weights import load_folder

__all__ = ["Workshop"]


class Workshop:
    """Holds the baseline and the model that is worked on. A step that the cache answers needs neither.

    Args:
        plan: says where the baseline and the text come from.
        scratch: an empty directory for this run alone; the baseline's answers are kept there.
    """

    def __init__(self, plan: Plan, scratch: Path) -> None:
        self._recipe, self._card, self._task = plan.recipe, plan.card, plan.task
        self.longest = min(plan.recipe.evaluation.context_length, plan.limits.max_length)
        """Tokens of one piece of the text at most."""
        self._scratch = scratch
        self._baseline: Model | None = None
        self._model: tuple[Path | None, Model] | None = None
        self._text: list[tuple[int, ...]] | None = None
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
    def text(self) -> list[tuple[int, ...]]:
        """The evaluation text in token ids."""
        if self._text is None:
            model, settings = self.baseline, self._recipe.evaluation
            dataset = settings.dataset.options
            self._text = self._task.text(model.tokenizer, model.files, dataset, settings.tokens, self.longest)
        return self._text

    @property
    def calibration(self) -> Calibration:
        """What transforms run the model on: windows that evaluation does not use."""
        import torch

        if self._calibration is None:
            asked, model = self._recipe.calibration, self.baseline
            assert asked is not None
            length = calibration_length(asked, self._card)
            pieces = self._task.samples(model.tokenizer, model.files, asked.dataset.options, length)
            chosen = held_out(pieces, self.text, asked.samples)
            ids = (torch.tensor([piece]) for piece in chosen)
            self._calibration = Calibration(
                tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids)
            )
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
