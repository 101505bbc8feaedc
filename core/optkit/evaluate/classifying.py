"""Image classifiers beside the baseline: what gives logits for images, and how far apart they are."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from optkit.backends import TensorSession
from optkit.engine.images import LOGITS, PIXELS
from optkit.errors import DamagedError, GateFailed
from optkit.evaluate.images import Pictures
from optkit.evaluate.judge import Quality, distance, figure_of
from optkit.metrics import ClassificationMetric
from optkit.model import Model

__all__ = [
    "Classifier",
    "ModelClassifier",
    "RecordedClassifier",
    "SessionClassifier",
    "classification_parity",
    "evaluate_classifier",
]

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]
_BATCH_SIZE = 32


class Classifier(ABC):
    """An image classifier that can be asked."""

    @abstractmethod
    def logits(self, pixels: Floats) -> Floats:
        """`[images, classes]` float32 of prepared images `[images, channels, height, width]`, in one call."""


class ModelClassifier(Classifier):
    """An image classifier of transformers."""

    def __init__(self, model: Model) -> None:
        self._module: Any = model.module

    def logits(self, pixels: Floats) -> Floats:
        import torch

        with torch.inference_mode():
            logits: Floats = self._module(pixel_values=torch.from_numpy(pixels)).logits.float().numpy()
        return logits


class SessionClassifier(Classifier):
    """An open session of an image classifier, which stays open."""

    def __init__(self, session: TensorSession) -> None:
        self._session = session

    def logits(self, pixels: Floats) -> Floats:
        return self._session.run({PIXELS: pixels})[LOGITS].astype(np.float32, copy=False)


class RecordedClassifier(Classifier):
    """A classifier asked once for each batch, so that many candidates are judged by its answers."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._known: dict[bytes, Floats] = {}

    def logits(self, pixels: Floats) -> Floats:
        key = hashlib.sha256(pixels.tobytes()).digest()
        if key not in self._known:
            self._known[key] = self._classifier.logits(pixels)
        return self._known[key]


def evaluate_classifier(
    baseline: Classifier,
    candidate: Classifier,
    pictures: Pictures,
    metrics: Mapping[str, ClassificationMetric],
    progress: Progress,
) -> Quality:
    """Judge a candidate by its logits.

    Args:
        baseline: the unoptimized model.
        candidate: the model that is judged, with the same classes.
        pictures: at least one. Without labels, metrics that need them are left out.
        metrics: by name.
        progress: `progress(done, total, what)` after each batch.

    Raises:
        GateFailed: the candidate gives NaN, infinite or misshapen logits.
        DamagedError: the baseline gives NaN or infinite logits.
    """
    pairs = list(_pairs(baseline, candidate, pictures.pixels, progress))
    before, after = (np.concatenate(side) for side in zip(*pairs, strict=True))
    figures = {
        name: figure_of(
            metric,
            np.split(metric.per_image(before, before, pictures.labels), len(before)),
            np.split(metric.per_image(after, before, pictures.labels), len(before)),
        )
        for name, metric in metrics.items()
        if pictures.labelled or not metric.labelled
    }
    return Quality(len(pictures), len(pictures), figures)


def classification_parity(reference: Classifier, candidate: Classifier, pixels: Floats) -> float:
    """Distance of two classifiers that should be the same model: the largest `|a - b| / |a|` of an image's logits.

    To be held against `optkit.backends.Lowering.tolerance`.

    Raises:
        GateFailed, DamagedError: see `evaluate_classifier`.
    """
    expected, found = reference.logits(pixels), candidate.logits(pixels)
    _check(expected, found)
    return max(distance(expected[place, None], found[place, None]) for place in range(len(pixels)))


def _pairs(
    baseline: Classifier, candidate: Classifier, pixels: Floats, progress: Progress
) -> Iterator[tuple[Floats, Floats]]:
    progress(0, len(pixels), "images")
    for start in range(0, len(pixels), _BATCH_SIZE):
        batch = pixels[start : start + _BATCH_SIZE]
        expected, found = baseline.logits(batch), candidate.logits(batch)
        _check(expected, found)
        yield expected, found
        progress(start + len(batch), len(pixels), "images")


def _check(expected: Floats, found: Floats) -> None:
    if not np.isfinite(expected).all():
        raise DamagedError("the baseline gives NaN or infinite logits", remedy="check the model's files")
    if found.shape != expected.shape:
        raise GateFailed(
            f"the model gives logits of another shape than the baseline's {expected.shape}", found=found.shape
        )
    if not np.isfinite(found).all():
        raise GateFailed("the model gives NaN or infinite logits", remedy="remove the transform that broke it")
