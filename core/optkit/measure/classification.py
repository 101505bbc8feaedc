"""Measuring image classifiers: logits of prepared images, and timed passes over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optkit.backends import AnySession, TensorSession
from optkit.bench import (
    ImageArm,
    ImageWorkload,
    Samples,
    SessionImageArm,
    TransformersImageArm,
    measure_passes,
)
from optkit.calibration import Calibration
from optkit.datasets import ImageDataset, LabelledImage
from optkit.engine.images import PIXELS, classifies_images
from optkit.errors import GateFailed, OptkitError
from optkit.evaluate import (
    Classifier,
    ModelClassifier,
    Pictures,
    Quality,
    RecordedClassifier,
    SessionClassifier,
    class_numbers,
    classification_parity,
    evaluate_classifier,
    evenly,
    prepared,
    unseen,
)
from optkit.measure.task import Amount, Demand, Task, Told
from optkit.metrics import ClassificationMetric, ImageRun, ImageRunMetric, Metric
from optkit.model import Model, ModelCard
from optkit.recipe import Benchmark, CalibrationData, Gate, Recipe
from optkit.steps import Limits
from optkit.weights import ImagePreparation

__all__ = ["Classification"]

_FLOAT = 4
_BATCH_SIZE = 32
_PARITY_IMAGES = 16
# Images of one batch to learn from, where there are so many that a transform may hold some of them out.
_CALIBRATION_ROWS, _CALIBRATION_BATCHES = 16, 8
# ResNet-50 multiplies each weight for 160 places of an image of 224 by 224 pixels, a vision transformer for each of its
# 197 patches, MobileNetV2 for 90: about one for each patch of 16 by 16 pixels.
_PATCH = 16 * 16
_USUAL = (3, 224, 224)
# Of a layer's activations, in numbers for each pixel of the image: ResNet-50's first blocks hold three maps of 16.
_LIVE_WIDTHS = 48


class Classification(Task[Classifier, ImageArm, ImagePreparation, Pictures]):
    """Image classifiers."""

    noun = "image classifier"
    output = "logits"
    generates = False
    dataset = ImageDataset
    meaningless = (
        ("benchmark", "prompt_tokens"),
        ("benchmark", "output_tokens"),
        ("evaluation", "tokens"),
        ("evaluation", "context_length"),
        ("calibration", "sequence_length"),
        ("max_length",),
        ("kv_cache_tokens",),
    )
    gates = (
        Gate(metric="label_agreement", at_least=0.95),
        Gate(metric="images_per_second", at_least="-5%"),
    )
    quality_metric = ClassificationMetric
    speed_metric = ImageRunMetric

    def scorer(self, model: Model) -> Classifier:
        return ModelClassifier(model)

    def scorer_of_session(self, session: AnySession, weights: Path) -> Classifier:
        if not (isinstance(session, TensorSession) and classifies_images(session)):
            raise GateFailed("the backend opened an image classifier as another kind of model")
        return SessionClassifier(session)

    def scorer_of_arm(self, arm: ImageArm) -> Classifier:
        if isinstance(arm, TransformersImageArm):
            assert arm.model is not None
            return ModelClassifier(arm.model)
        assert isinstance(arm, SessionImageArm)
        return SessionClassifier(arm.session)

    def recorded(self, scorer: Classifier, scratch: Path) -> Classifier:
        return RecordedClassifier(scorer)

    def reader(self, model: Model) -> ImagePreparation:
        return ImagePreparation.of(model)

    def reader_of_folder(self, weights: Path) -> ImagePreparation:
        return ImagePreparation.of_folder(weights)

    def data(self, reader: ImagePreparation, dataset: ImageDataset, amount: Amount, longest: int) -> Pictures:
        return prepared(evenly(dataset.images(), amount.images), reader)

    def calibration(
        self, reader: ImagePreparation, asked: CalibrationData, card: ModelCard, judged: Pictures
    ) -> Calibration:
        import torch

        dataset: Any = asked.dataset.options
        pixels = torch.from_numpy(unseen(dataset.images(), reader, judged, asked.samples))
        rows = max(1, min(_CALIBRATION_ROWS, asked.samples // _CALIBRATION_BATCHES))
        return Calibration(tuple({PIXELS: batch} for batch in torch.split(pixels, rows)))

    def evaluate(
        self,
        baseline: Classifier,
        candidate: Classifier,
        data: Pictures,
        metrics: Mapping[str, ClassificationMetric],
        told: Told,
    ) -> Quality:
        return evaluate_classifier(baseline, candidate, data, metrics, told)

    def parity(self, reference: Classifier, candidate: Classifier, data: Pictures) -> float:
        return classification_parity(reference, candidate, data.pixels[:: -(-len(data) // _PARITY_IMAGES)])

    def time(self, arms: Sequence[ImageArm], data: Pictures, settings: Benchmark, told: Told) -> Samples[ImageRun]:
        workload = ImageWorkload(len(data), settings.blocks, settings.seed)
        return measure_passes(arms, data.pixels, workload, told, again=arms[-1].name)

    def request(self, data: Pictures, settings: Benchmark) -> dict[str, Any]:
        return {"pixels": data.pixels.shape[1:]}

    def positions(self, recipe: Recipe) -> int:
        return 1

    def check(self, recipe: Recipe, card: ModelCard, gated: Sequence[type[Metric]]) -> tuple[str, ...]:
        """Counts images and compares their classes with the model's; reads none."""
        images = self._images(recipe, "evaluation", recipe.evaluation.dataset.options)
        try:
            numbers = class_numbers((image.label for image in images), card.labels)
        except OptkitError as error:
            raise recipe.placed(error, "evaluation", "dataset") from error
        for index, metric in enumerate(gated):
            if None in numbers and issubclass(metric, ClassificationMetric) and metric.labelled:
                what = "needs the true class of every image, and the evaluation dataset has none"
                remedy = "put the images into one folder for each class, or gate on label_agreement"
                raise recipe.document.error(what, "gates", index, remedy=remedy)
        asked = recipe.calibration
        if asked is None:
            return ()
        there = len(self._images(recipe, "calibration", asked.dataset.options))
        # Of its own images those of the evaluation are not learnt from.
        used = min(recipe.evaluation.images, there) if asked.dataset == recipe.evaluation.dataset else 0
        if there - used < asked.samples:
            beside = f", {used} of them for the evaluation" if used else ""
            raise recipe.document.error(
                f"the dataset has {there} images{beside}",
                "calibration",
                "samples",
                found=asked.samples,
                remedy="lower it or evaluation.images, or choose a larger dataset",
            )
        return ()

    def demand(
        self, recipe: Recipe, card: ModelCard, limits: Limits, token_seconds: float, cache_value_bytes: int
    ) -> Demand:
        channels, height, width = card.pixels or _USUAL
        patches = math.ceil(height * width / _PATCH)
        images = recipe.evaluation.images
        learnt = 0 if recipe.calibration is None else recipe.calibration.samples
        kept = (images + learnt) * channels * height * width
        live = max(_BATCH_SIZE, limits.max_batch_size) * height * width * _LIVE_WIDTHS
        return Demand(
            memory_bytes=(kept + live) * _FLOAT,
            disk_bytes=0,
            evaluation_tokens=images * patches,
            calibration_tokens=learnt * patches,
            # Two runs a block for the baseline, and for both arms of the optimized model.
            benchmark_seconds=6 * recipe.benchmark.blocks * images * patches * token_seconds,
        )

    def batch_in_words(self, max_batch_size: int, max_length: int) -> str:
        return f"{max_batch_size} image{'' if max_batch_size == 1 else 's'}"

    def samples_in_words(self, asked: CalibrationData) -> str:
        return f"{asked.samples} images"

    def usage(self, artifact: Path) -> str:
        return f"Next: optkit explain {artifact}   or: optkit serve {artifact}"

    def _images(self, recipe: Recipe, section: str, dataset: Any) -> Sequence[LabelledImage]:
        try:
            found: Sequence[LabelledImage] = dataset.images()
        except OptkitError as error:
            raise recipe.placed(error, section, "dataset") from error
        return found
