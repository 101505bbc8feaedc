"""What the tasks of models that read text share: tokens out of a dataset, and whether there are enough of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from optkit.calibration import Calibration
from optkit.datasets import TextDataset
from optkit.errors import OptkitError
from optkit.evaluate import held_out
from optkit.measure.task import A, S, Task
from optkit.metrics import Metric
from optkit.model import Model, ModelCard
from optkit.recipe import CalibrationData, Evaluation, Recipe
from optkit.weights import sentence_files

__all__ = ["Reader", "Text", "TextTask", "calibration_length", "calibration_tokens"]

Text = Sequence[tuple[int, ...]]
# What a layer learns from should outnumber its input features a few times: below, its statistics are mostly noise.
_TOKENS_PER_INPUT = 4


@dataclass(frozen=True, slots=True)
class Reader:
    """What makes texts into tokens."""

    tokenizer: Any
    """Of transformers."""
    files: Mapping[str, str]
    """See `optkit.model.Model.files`."""


class TextTask(Task[S, A, Reader, Text]):
    """One kind of model that reads text."""

    dataset = TextDataset
    needs_whole: ClassVar[bool]
    """Whether a sample to learn from must have its full length, and not just one token."""

    @abstractmethod
    def samples(self, reader: Reader, dataset: TextDataset, length: int) -> Iterator[tuple[int, ...]]:
        """The whole dataset in token ids, in pieces of at most `length` tokens as a transform learns from them."""

    @abstractmethod
    def pieces(self, dataset: TextDataset) -> Iterator[str]:
        """The parts of a dataset that are tokenized one by one."""

    @abstractmethod
    def tokens(self, evaluation: Evaluation) -> int:
        """Tokens of text that evaluation takes."""

    def reader(self, model: Model) -> Reader:
        return Reader(model.tokenizer, model.files)

    def reader_of_folder(self, weights: Path) -> Reader:
        from optkit.engine.text import load_tokenizer

        return Reader(load_tokenizer(weights), sentence_files(weights))

    def calibration(self, reader: Reader, asked: CalibrationData, card: ModelCard, judged: Text) -> Calibration:
        import torch

        dataset: Any = asked.dataset.options
        pieces = self.samples(reader, dataset, calibration_length(asked, card))
        ids = (torch.tensor([piece]) for piece in held_out(pieces, judged, asked.samples))
        return Calibration(tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids))

    def check(self, recipe: Recipe, card: ModelCard, gated: Sequence[type[Metric]]) -> tuple[str, ...]:
        """No tokenizer is asked: it makes at most a token of a byte."""
        needed, dataset = self.tokens(recipe.evaluation), recipe.evaluation.dataset
        there = self._bytes(recipe, "evaluation", dataset.options, needed)
        if there < needed:
            raise recipe.document.error(
                f"the dataset has at most {there} tokens of text",
                "evaluation",
                "tokens",
                found=recipe.evaluation.tokens,
                remedy="lower it, or choose a longer dataset",
            )
        return () if recipe.calibration is None else self._check_calibration(recipe, recipe.calibration, card)

    def batch_in_words(self, max_batch_size: int, max_length: int) -> str:
        return f"{max_batch_size} sequence{'' if max_batch_size == 1 else 's'} of up to {max_length} tokens"

    def samples_in_words(self, asked: CalibrationData) -> str:
        return f"{asked.samples} samples of up to {asked.sequence_length} tokens"

    def _check_calibration(self, recipe: Recipe, asked: CalibrationData, card: ModelCard) -> tuple[str, ...]:
        length = calibration_length(asked, card)
        needed = asked.samples * (length if self.needs_whole else 1)
        there = self._bytes(recipe, "calibration", asked.dataset.options, needed)
        if there < needed:
            raise recipe.document.error(
                f"the dataset has at most {there} tokens of text",
                "calibration",
                "samples",
                found=asked.samples,
                remedy="lower it, or choose a longer dataset",
            )
        tokens, widest = asked.samples * length, max(inputs for _, inputs in card.linears.values())
        if tokens >= _TOKENS_PER_INPUT * widest:
            return ()
        where = recipe.document.where("calibration")
        enough = -(-_TOKENS_PER_INPUT * widest // length)
        few = f"{tokens} tokens are few for layers with {widest} input features, quality may suffer"
        return (f"{where}: calibration: {few}; raise samples to {enough}",)

    def _bytes(self, recipe: Recipe, section: str, dataset: Any, enough: int) -> int:
        """Bytes of a dataset, counted up to `enough`."""
        there = 0
        try:
            for text in self.pieces(dataset):
                there += len(text.encode()) + 2
                if there >= enough:
                    break
        except OptkitError as error:
            raise recipe.placed(error, section, "dataset") from error
        return there


def calibration_length(asked: CalibrationData, card: ModelCard) -> int:
    """Tokens of one sample at most: no more than the model was trained for."""
    return min(asked.sequence_length, card.max_length)


def calibration_tokens(recipe: Recipe, card: ModelCard) -> int:
    """Tokens of all samples at most; 0 where nothing is learnt."""
    asked = recipe.calibration
    return 0 if asked is None else asked.samples * calibration_length(asked, card)
