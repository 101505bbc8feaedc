"""What planning and measuring must know of one kind of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from optkit.backends import AnySession
from optkit.bench import Arm, Samples
from optkit.datasets import Dataset
from optkit.evaluate import Quality
from optkit.metrics import Metric
from optkit.model import Model, ModelCard
from optkit.recipe import Benchmark, Evaluation, Gate, Recipe
from optkit.steps import Limits

__all__ = ["Demand", "Task"]

S = TypeVar("S")
A = TypeVar("A", bound=Arm)
Text = Sequence[tuple[int, ...]]
Told = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Demand:
    """What measuring takes, besides the models."""

    memory_bytes: int
    disk_bytes: int
    benchmark_seconds: float


class Task(ABC, Generic[S, A]):
    """One kind of model. `S` is what answers for its quality, `A` what is timed."""

    noun: ClassVar[str]
    """What users call such a model."""
    output: ClassVar[str]
    """What the model gives, which parity compares."""
    generates: ClassVar[bool]
    """Whether it continues prompts, so that prompt and output tokens and a KV cache mean something."""
    gates: ClassVar[tuple[Gate, ...]]
    """Of a recipe that sets none."""
    quality_metric: ClassVar[type[Metric]]
    speed_metric: ClassVar[type[Metric]]

    # --- what is measured

    @abstractmethod
    def scorer(self, model: Model) -> S:
        """What answers for a loaded model."""

    @abstractmethod
    def scorer_of_session(self, session: AnySession, weights: Path) -> S:
        """What answers for an open session over a weights folder."""

    @abstractmethod
    def scorer_of_arm(self, arm: A) -> S:
        """What answers for the model or session that an arm of a benchmark has open."""

    @abstractmethod
    def recorded(self, scorer: S, scratch: Path) -> S:
        """The same, asked only once for everything; it may keep answers in the empty directory `scratch`."""

    # --- how

    @abstractmethod
    def text(
        self, tokenizer: Any, files: Mapping[str, str], dataset: Dataset, tokens: int, context_length: int
    ) -> list[tuple[int, ...]]:
        """The evaluation text in token ids.

        Args:
            tokenizer: of transformers.
            files: see `optkit.model.Model.files`.
            dataset: the text.
            tokens: most tokens in all.
            context_length: most tokens of one piece.

        Raises:
            RecipeError: the dataset has less text.
        """

    @abstractmethod
    def samples(
        self, tokenizer: Any, files: Mapping[str, str], dataset: Dataset, length: int
    ) -> Iterator[tuple[int, ...]]:
        """The whole dataset in token ids, in pieces of at most `length` tokens as a transform learns from them."""

    @abstractmethod
    def evaluate(self, baseline: S, candidate: S, text: Text, metrics: Mapping[str, Any], told: Told) -> Quality:
        """Judge a candidate by metrics of the shape `quality_metric`."""

    @abstractmethod
    def parity(self, reference: S, candidate: S, text: Text) -> float:
        """Distance of a runtime's output from the transformed model's on a little of the text; see `Lowering`."""

    @abstractmethod
    def time(self, arms: Sequence[A], text: Text, settings: Benchmark, told: Told) -> Samples[Any]:
        """Run arms by turns, the last one a second time against itself, and close them."""

    @abstractmethod
    def request(self, text: Text, settings: Benchmark) -> tuple[tuple[int, ...], int]:
        """The prompt and the number of output tokens of the one request that memory is measured with."""

    # --- what planning asks

    @abstractmethod
    def positions(self, recipe: Recipe) -> int:
        """Tokens of one sequence that measuring needs."""

    @abstractmethod
    def pieces(self, dataset: Dataset) -> Iterator[str]:
        """The parts of a dataset that are tokenized one by one."""

    @abstractmethod
    def tokens(self, evaluation: Evaluation) -> int:
        """Tokens of text that evaluation takes."""

    @abstractmethod
    def demand(
        self, recipe: Recipe, card: ModelCard, limits: Limits, token_seconds: float, cache_value_bytes: int
    ) -> Demand:
        """What measuring takes.

        Args:
            recipe: says how much is measured.
            card: of the model.
            limits: of the session.
            token_seconds: of computing one token of many at once.
            cache_value_bytes: of one number in the KV cache.
        """
