"""What a model's quality and cost are measured by. A metric is one figure; how it is sampled decides its shape."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from optkit.options import Options

__all__ = [
    "ClassificationMetric",
    "EmbeddingMetric",
    "EncodingMetric",
    "EncodingRun",
    "Footprint",
    "FootprintMetric",
    "ImageRun",
    "ImageRunMetric",
    "Metric",
    "Run",
    "RunMetric",
    "TokenMetric",
]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Run:
    """One generation, timed from outside. Seconds count from the moment the request was handed over."""

    prompt_tokens: int
    token_seconds: tuple[float, ...]
    """When each output token was there, increasing."""
    output: tuple[int, ...]
    """The output token ids; as many as `token_seconds`."""


@dataclass(frozen=True, slots=True)
class EncodingRun:
    """One pass of an encoder over many sequences, timed from outside."""

    sequences: int
    tokens: int
    """Of all sequences, without padding."""
    seconds: float
    """From handing them over until the last embedding was there."""


@dataclass(frozen=True, slots=True)
class ImageRun:
    """One pass of an image classifier over many prepared images, timed from outside."""

    images: int
    seconds: float
    """From handing them over until the last logits were there."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one configuration takes up."""

    disk_bytes: int
    """Bytes of the files that are read to run it."""
    peak_memory_bytes: int
    """Highest resident memory of a fresh process that opens it and answers one request."""


class Metric(Options):
    """One figure with a unit and a direction."""

    unit: ClassVar[str]
    better: ClassVar[Literal["higher", "lower"]]
    relative: ClassVar[bool] = True
    """Whether its ratio to the baseline's figure means anything. A distance from the baseline has none."""


class TokenMetric(Metric):
    """Quality: one value per predicted token, from the logits of the model and of the baseline."""

    @abstractmethod
    def per_token(self, logits: Floats, baseline: Floats, targets: npt.NDArray[np.int64]) -> Floats:
        """One value per position.

        Args:
            logits: `[positions, vocabulary]` float32 of the model that is judged.
            baseline: the same positions of the unoptimized model. Judging the baseline itself passes it twice.
            targets: `[positions]`, the token that really came next.
        """

    @abstractmethod
    def aggregate(self, values: Floats) -> float:
        """The figure from the values of all positions."""


class EmbeddingMetric(Metric):
    """Quality of an encoder: one value per sequence, from the embeddings of the model and of the baseline."""

    @abstractmethod
    def per_sequence(self, embeddings: Floats, baseline: Floats) -> Floats:
        """One value per sequence.

        Args:
            embeddings: `[sequences, hidden]` float32 of the model that is judged.
            baseline: of the unoptimized model, for the same sequences. Judging the baseline itself passes it twice.
        """

    @abstractmethod
    def aggregate(self, values: Floats) -> float:
        """The figure from the values of all sequences."""


class ClassificationMetric(Metric):
    """Quality of a classifier: one value per image, from the logits of the model and of the baseline."""

    labelled: ClassVar[bool] = False
    """Whether it needs the true classes. It is left out where the dataset has none."""

    @abstractmethod
    def per_image(self, logits: Floats, baseline: Floats, labels: npt.NDArray[np.int64]) -> Floats:
        """One value per image.

        Args:
            logits: `[images, classes]` float32 of the model that is judged.
            baseline: of the unoptimized model, for the same images. Judging the baseline itself passes it twice.
            labels: `[images]`, the true class; -1 where it is unknown.
        """

    @abstractmethod
    def aggregate(self, values: Floats) -> float:
        """The figure from the values of all images."""


class RunMetric(Metric):
    """Speed: one value per timed generation."""

    @abstractmethod
    def of(self, run: Run) -> float:
        """The figure of one run, positive."""


class EncodingMetric(Metric):
    """Speed of an encoder: one value per timed pass over all sequences."""

    @abstractmethod
    def of(self, run: EncodingRun) -> float:
        """The figure of one pass, positive."""


class ImageRunMetric(Metric):
    """Speed of an image classifier: one value per timed pass over all images."""

    @abstractmethod
    def of(self, run: ImageRun) -> float:
        """The figure of one pass, positive."""


class FootprintMetric(Metric):
    """Cost: one value per configuration."""

    @abstractmethod
    def of(self, footprint: Footprint) -> float:
        """The figure, positive."""
