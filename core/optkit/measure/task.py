"""What planning and measuring must know of one kind of model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from optkit.backends import AnySession
from optkit.bench import Arm, Samples
from optkit.calibration import Calibration
from optkit.datasets import Dataset
from optkit.evaluate import Quality
from optkit.metrics import Metric
from optkit.model import Model, ModelCard
from optkit.recipe import Benchmark, CalibrationData, Gate, Recipe
from optkit.steps import Limits

__all__ = ["Amount", "AnyTask", "Demand", "Task", "Told"]

S = TypeVar("S")
A = TypeVar("A", bound=Arm)
R = TypeVar("R")
D = TypeVar("D")
Told = Callable[[int, int, str], None]


class Amount(Protocol):
    """How much a model is judged on; `optkit.recipe.Evaluation` and `EvaluationKeys` are such."""

    @property
    def tokens(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def images(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Demand:
    """What measuring takes, besides the models."""

    memory_bytes: int
    disk_bytes: int
    evaluation_tokens: int
    """Computed once for each model that is judged. Of an image classifier, patches of 16 by 16 pixels."""
    calibration_tokens: int
    """Likewise, in one run of the model on what it is to learn from."""
    benchmark_seconds: float


class Task(ABC, Generic[S, A, R, D]):
    """One kind of model. `S` is what answers for its quality, `A` what is timed, `R` what makes a dataset into inputs
    of the model, `D` the inputs that it is judged on."""

    noun: ClassVar[str]
    """What users call such a model."""
    output: ClassVar[str]
    """What the model gives, which parity compares."""
    generates: ClassVar[bool]
    """Whether it continues prompts, so that prompt and output tokens mean something."""
    dataset: ClassVar[type[Dataset]]
    """What it is judged on and learns from."""
    meaningless: ClassVar[tuple[tuple[str, ...], ...]]
    """Keys of a recipe that mean nothing for it."""
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

    # --- on what

    @abstractmethod
    def reader(self, model: Model) -> R:
        """What makes a dataset into inputs of a loaded model."""

    @abstractmethod
    def reader_of_folder(self, weights: Path) -> R:
        """The same for the model in a weights folder."""

    @abstractmethod
    def data(self, reader: R, dataset: Any, amount: Amount, longest: int) -> D:
        """What a model is judged on.

        Args:
            reader: of the model.
            dataset: of the kind `self.dataset`.
            amount: how much.
            longest: tokens of one piece at most, for what is made of tokens.

        Raises:
            RecipeError: the dataset does not go with the model, or has less.
        """

    @abstractmethod
    def calibration(self, reader: R, asked: CalibrationData, card: ModelCard, judged: D) -> Calibration:
        """What transforms run the model on: nothing that it is judged on.

        Raises:
            RecipeError: the dataset has less.
        """

    # --- how

    @abstractmethod
    def evaluate(self, baseline: S, candidate: S, data: D, metrics: Mapping[str, Any], told: Told) -> Quality:
        """Judge a candidate by metrics of the shape `quality_metric`."""

    @abstractmethod
    def parity(self, reference: S, candidate: S, data: D) -> float:
        """Distance of a runtime's output from the transformed model's on a little of the data; see `Lowering`."""

    @abstractmethod
    def time(self, arms: Sequence[A], data: D, settings: Benchmark, told: Told) -> Samples[Any]:
        """Run arms by turns, the last one a second time against itself, and close them."""

    @abstractmethod
    def request(self, data: D, settings: Benchmark) -> dict[str, Any]:
        """In JSON the one request that memory is measured with; see `optkit.bench.Arm.answer`."""

    # --- what planning asks

    @abstractmethod
    def positions(self, recipe: Recipe) -> int:
        """Tokens of one sequence that measuring needs."""

    @abstractmethod
    def check(self, recipe: Recipe, card: ModelCard, gated: Sequence[type[Metric]]) -> tuple[str, ...]:
        """Refuse, before the work, data that cannot do; warn, one line each, of what is likely not to.

        Args:
            recipe: whose datasets are of the kind `self.dataset`.
            card: of the model.
            gated: the metrics of the recipe's gates, in their order.

        Raises:
            RecipeError: there is certain to be too little of it, or it does not go with the model.
            MissingError, DamagedError: it is not on this machine, or not in its format.
        """

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

    # --- for people

    @abstractmethod
    def batch_in_words(self, max_batch_size: int, max_length: int) -> str:
        """What a session holds: `8 sequences of up to 512 tokens`."""

    @abstractmethod
    def samples_in_words(self, asked: CalibrationData) -> str:
        """What transforms learn from: `128 samples of up to 512 tokens`."""

    @abstractmethod
    def usage(self, artifact: Path) -> str:
        """A line that says what to do next with a finished artifact."""


AnyTask = Task[Any, Any, Any, Any]
