"""Weight transforms: one interface for everything that changes a model before it is compiled."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.model import Model, ModelCard
from optkit.options import Options

__all__ = ["Transform", "TransformContext"]


@dataclass(frozen=True, slots=True)
class TransformContext:
    """What a transform may use besides the model."""

    progress: Callable[[int, int, str], None]
    """`progress(done, total, what)`: call it at least once a second in long work."""
    calibration: Calibration = field(default_factory=Calibration)
    """What the model is to be run on; empty for a transform that does not ask for it."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Where to keep what is finished of long work. It is empty at first, and gone when the transform is done."""
    device: str = "cpu"
    """Where to compute, as torch names it. The model comes and goes on the CPU; `optkit.blockwise` moves it there block
    by block."""
    baseline: Model | None = None
    """The model that the recipe started with, never to be changed; None for a transform that does not ask for it."""


class Transform(Options):
    """Changes a model's weights or structure.

    A transform declares only its own side: the tags that it needs, those that it cannot stand, and those that it adds.
    Patterns in `conflicts` may use `*`. Planning folds the tags through the recipe before any weight is read.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[frozenset[str]] = frozenset()
    calibration: ClassVar[bool] = False
    """Whether it runs the model on calibration data, which the recipe's `calibration` names."""
    baseline: ClassVar[bool] = False
    """Whether it learns from the model that the recipe started with."""

    @abstractmethod
    def provides(self) -> frozenset[str]:
        """The tags that the transformed model gains."""

    def check(self, card: ModelCard) -> None:
        """Refuse, from the model's facts alone, what `apply` could not do.

        Raises:
            RecipeError: an option does not fit this model.
        """

    def after(self, card: ModelCard) -> ModelCard:
        """The facts of the model that `apply` gives, as far as they are known before it. Its tags are of no account."""
        return card

    def bits_per_weight(self, card: ModelCard) -> float | None:
        """Stored bits per parameter afterwards, scales included, for the size estimate; None if it stays as it is."""
        return None

    def work_bytes(self, card: ModelCard) -> int:
        """Memory that `apply` takes besides the model and its calibration data, for the estimate."""
        return 0

    def forward_passes(self) -> float:
        """About how often it runs the model on its calibration data, or work as long as that, for the time estimate."""
        return 2.0 if self.calibration else 0.0

    @abstractmethod
    def apply(self, model: Model, context: TransformContext) -> Model:
        """Transform `model` and return the one to use. The given model may be changed in place."""
