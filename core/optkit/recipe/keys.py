"""What a recipe may say: its keys and those of its sections, before plugins are looked up."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from optkit.options import Options

__all__ = ["Benchmark", "CalibrationKeys", "EvaluationKeys", "Gate", "Limit", "RecipeKeys"]

_PERCENT = re.compile(r"([+-]\d+(?:\.\d+)?)%", re.ASCII)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)x", re.ASCII)
_NO_LIMIT = "is no limit; write a percentage like +3%, a ratio like 1.5x, or a number without quotes"
_LIMIT_SCHEMA = {
    "anyOf": [{"type": "number"}, {"type": "string", "pattern": rf"^({_PERCENT.pattern}|{_RATIO.pattern})$"}]
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What a gate allows."""

    kind: Literal["ratio", "absolute"]
    """`ratio`: of the metric to the baseline's; `absolute`: of the metric itself."""
    value: float


def _limit(text: str | int | float) -> Limit:
    if isinstance(text, int | float):
        return Limit("absolute", float(text))
    if percent := _PERCENT.fullmatch(text):
        ratio = (100 + float(percent[1])) / 100
    elif times := _RATIO.fullmatch(text):
        ratio = float(times[1])
    else:
        raise ValueError(_NO_LIMIT)
    if not 0 < ratio < 1e6:
        raise ValueError("must be above -100% or 0x, and below 1000000x")
    return Limit("ratio", ratio)


def _checked(value: object) -> object:
    if value is not None:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(_NO_LIMIT)
        _limit(value)
    return value


Bound = Annotated[str | int | float | None, BeforeValidator(_checked), WithJsonSchema(_LIMIT_SCHEMA)]


class Gate(Options):
    """A limit on one metric of the optimized model. If the result misses it, nothing is published.

    A limit is relative to the baseline, `+3%`, `-10%` or `1.5x`, or a plain number in the metric's own unit.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["at_most"]}, {"required": ["at_least"]}]})

    metric: str
    """A metric; `optkit plugins list` shows them."""
    at_most: Bound = None
    """The largest value that passes."""
    at_least: Bound = None
    """The smallest value that passes."""

    @model_validator(mode="after")
    def _one_side(self) -> Gate:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("needs either at_most or at_least; write one of them, and a second gate for the other")
        return self

    @property
    def limit(self) -> Limit:
        """What `at_most` or `at_least` stands for."""
        return next(_limit(bound) for bound in (self.at_most, self.at_least) if bound is not None)


class Benchmark(Options):
    """How speed is measured: prompt and output lengths of a run, and how often it is repeated.

    An encoder embeds the evaluation text, an image classifier reads the evaluation images; they have no prompt and no
    output tokens.
    """

    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of the prompt."""
    output_tokens: int = Field(default=32, ge=8)
    """Tokens to generate."""
    blocks: int = Field(default=6, ge=3, le=1000)
    """Repetitions; each runs the baseline and the optimized model in random order. More narrow the interval."""
    seed: int = Field(default=0, ge=0, le=(1 << 32) - 1)
    """Of the prompts and of the order of runs."""


class EvaluationKeys(Options):
    """How quality is measured: the data, and how much of it; of text also in windows of which length."""

    dataset: Any = "python_reference"
    """A dataset plugin: of text, or of images for an image classifier."""
    tokens: int = Field(default=4096, ge=256)
    """Tokens to evaluate; more narrow the interval."""
    context_length: int = Field(default=512, ge=32)
    """Tokens of one window. An encoder reads paragraphs, which are cut at this length."""
    images: int = Field(default=256, ge=2, le=100_000)
    """Images that an image classifier is judged by, taken at even distances over the whole dataset, or all if there are
    fewer."""


class CalibrationKeys(Options):
    """What transforms learn from that run the model on data: never what evaluation judges by.

    Windows of text that share 32 tokens in a row with the evaluation text are left out, and the others are taken at
    even distances over the whole dataset. An encoder reads paragraphs. Images are drawn at random, by the same seed
    every time, and those that are equal to an evaluation image are left out.
    """

    dataset: Any = "python_reference"
    """A dataset plugin."""
    samples: int = Field(default=128, ge=1, le=65536)
    """Windows of text, or images. More cost time and say more."""
    sequence_length: int = Field(default=512, ge=16)
    """Tokens of one window, at most what the model was trained for. An encoder's paragraphs are cut there."""


class RecipeKeys(Options):
    """A recipe: a model, what is done to its weights, and what runs it."""

    name: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    """The artifact's name; the name of the recipe's file by default."""
    model: Any
    """Where the model comes from: a source plugin."""
    transforms: tuple[Any, ...] = ()
    """What is done to its weights, in this order: transform plugins."""
    backend: Any = "torch"
    """The runtime: a backend plugin."""
    batching: Any = "static"
    """The batching strategy: a batcher plugin."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of one sequence, prompt and output together; by default what the model was trained for, at most 2048.
    Means nothing for an image classifier."""
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    """Tokens that the KV cache holds for all sequences together; by default what they can use, or what measured free
    memory allows, whichever is less."""
    calibration: CalibrationKeys | None = None
    """What transforms learn from that run the model on data; by default 128 windows of `python_reference`."""
    evaluation: EvaluationKeys = EvaluationKeys()
    benchmark: Benchmark = Benchmark()
    gates: tuple[Gate, ...] | None = None
    """Limits that the result must keep; an empty list means none. By default a causal language model keeps `perplexity`
    within +5% and `decode_tokens_per_second` within -5%, an encoder `embedding_cosine` at 0.95 or more and
    `sequences_per_second` within -5%, an image classifier `label_agreement` at 0.95 or more and `images_per_second`
    within -5%."""
