"""Whether there is enough text to evaluate on and to learn from, found out before the work."""

from __future__ import annotations

from typing import Any

from optkit.datasets import Dataset
from optkit.errors import OptkitError
from optkit.measure import Task
from optkit.model import ModelCard
from optkit.recipe import CalibrationText, Recipe

__all__ = ["calibration_length", "check_calibration", "check_text", "placed"]

# What a layer learns from should outnumber its input features a few times: below, its statistics are mostly noise.
_TOKENS_PER_INPUT = 4


def check_text(recipe: Recipe, task: Task[Any, Any]) -> None:
    """Refuse what is certain to be too little text. No tokenizer is asked: it makes at most a token of a byte."""
    evaluation, prompt = recipe.evaluation, recipe.benchmark.prompt_tokens
    needed = task.tokens(evaluation)
    if task.generates and prompt > needed:
        raise recipe.document.error(
            f"the evaluation text, which prompts are taken from, has {needed} tokens",
            "benchmark",
            "prompt_tokens",
            found=prompt,
            remedy="lower it, or raise evaluation.tokens",
        )
    there = _bytes(recipe, task, "evaluation", evaluation.dataset.options, needed)
    if there < needed:
        raise recipe.document.error(
            f"the dataset has at most {there} tokens of text",
            "evaluation",
            "tokens",
            found=evaluation.tokens,
            remedy="lower it, or choose a longer dataset",
        )


def check_calibration(recipe: Recipe, card: ModelCard, task: Task[Any, Any]) -> tuple[str, ...]:
    """Refuse what is certain to be too little data; warn of what is likely to be too little."""
    asked = recipe.calibration
    if asked is None:
        return ()
    length = calibration_length(asked, card)
    # An encoder's paragraphs may be as short as they like.
    needed = asked.samples * (length if task.generates else 1)
    there = _bytes(recipe, task, "calibration", asked.dataset.options, needed)
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


def calibration_length(asked: CalibrationText, card: ModelCard) -> int:
    """Tokens of one sample at most: no more than the model was trained for."""
    return min(asked.sequence_length, card.max_length)


def _bytes(recipe: Recipe, task: Task[Any, Any], section: str, dataset: Dataset, enough: int) -> int:
    """Bytes of a dataset, counted up to `enough`; a tokenizer makes at most a token of a byte."""
    there = 0
    try:
        for text in task.pieces(dataset):
            there += len(text.encode()) + 2
            if there >= enough:
                break
    except OptkitError as error:
        raise placed(error, recipe, section, "dataset") from error
    return there


def placed(error: OptkitError, recipe: Recipe, *keys: str | int) -> OptkitError:
    """The same error with its place in the recipe before the file that it names."""
    what = f"{error.where}: {error.what}" if error.where else error.what
    return type(error)(what, where=recipe.document.where(*keys), found=error.found, remedy=error.remedy)
