"""Image classifiers beside the baseline: figures, parity, labels, and images that were never seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.builtin.quality import Accuracy, LabelAgreement
from optkit.datasets import LabelledImage
from optkit.errors import DamagedError, GateFailed, RecipeError
from optkit.evaluate import (
    Classifier,
    Pictures,
    RecordedClassifier,
    class_numbers,
    classification_parity,
    evaluate_classifier,
    evenly,
    unseen,
)

METRICS = {"label_agreement": LabelAgreement(), "accuracy": Accuracy()}


class Linear(Classifier):
    """Logits are a matrix times the pixels; counts the images that it was asked for."""

    def __init__(self, matrix):
        self.matrix, self.asked = np.asarray(matrix, np.float32), 0

    def logits(self, pixels):
        self.asked += len(pixels)
        return pixels.reshape(len(pixels), -1) @ self.matrix


class Preparation:
    """The first value of an image is its pixel."""

    labels, shape = ("cat", "dog", "3"), (1, 1, 1)

    def __call__(self, image):
        return image[:1, :1, 0].astype(np.float32)[None]


def pictures(count=70, labelled=True):
    random = np.random.default_rng(1)
    labels = random.integers(0, 3, count) if labelled else np.full(count, -1)
    return Pictures(random.normal(size=(count, 1, 2, 2)).astype(np.float32), labels.astype(np.int64))


def image(value, label=None):
    return LabelledImage(label, lambda: np.full((2, 2, 3), value, np.uint8))


def test_figures_are_fractions_of_all_images():
    random = np.random.default_rng(0)
    matrix = random.normal(size=(4, 3))
    baseline, candidate, given = Linear(matrix), Linear(matrix + random.normal(size=(4, 3))), pictures()
    told = []
    quality = evaluate_classifier(baseline, candidate, given, METRICS, lambda *what: told.append(what))
    ours, theirs = (one.logits(given.pixels).argmax(1) for one in (candidate, baseline))
    agreement, accuracy = (quality.metrics[name] for name in METRICS)
    assert (quality.windows, agreement.baseline, agreement.ratio) == (70, 1.0, None)
    assert agreement.value == pytest.approx((ours == theirs).mean())
    assert accuracy.value == pytest.approx((ours == given.labels).mean())
    assert accuracy.baseline == pytest.approx((theirs == given.labels).mean())
    assert accuracy.ratio.low < accuracy.ratio.value == pytest.approx(accuracy.value / accuracy.baseline)
    assert 0 < agreement.interval.low < agreement.value < agreement.interval.high < 1
    assert told[0] == (0, 70, "images")
    assert told[-1] == (70, 70, "images")


def test_without_labels_accuracy_is_left_out():
    model = Linear(np.eye(4, 3))
    quality = evaluate_classifier(model, model, pictures(labelled=False), METRICS, lambda *_: None)
    assert quality.metrics.keys() == {"label_agreement"}


def test_a_recorded_baseline_is_asked_once():
    baseline, given = Linear(np.eye(4, 3)), pictures(20)
    recorded = RecordedClassifier(baseline)
    for _ in range(2):
        evaluate_classifier(recorded, Linear(np.eye(4, 3)), given, METRICS, lambda *_: None)
    assert baseline.asked == len(given)


def test_parity_is_the_distance_of_the_worst_image():
    pixels = np.eye(4, dtype=np.float32).reshape(4, 1, 2, 2)
    wanted = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 4], [1, 1, 1]])
    found = wanted + np.array([[0.1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]])
    assert classification_parity(Linear(wanted), Linear(found), pixels) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("baseline", "candidate", "error", "words"),
    [
        (np.eye(4, 3), np.full((4, 3), np.nan), GateFailed, "the model gives NaN"),
        (np.eye(4, 3), np.eye(4, 5), GateFailed, r"another shape than the baseline's \(32, 3\), found \(32, 5\)"),
        (np.full((4, 3), np.inf), np.eye(4, 3), DamagedError, "the baseline gives NaN"),
    ],
)
def test_broken_models_are_refused(baseline, candidate, error, words):
    with pytest.raises(error, match=words), np.errstate(invalid="ignore"):
        evaluate_classifier(Linear(baseline), Linear(candidate), pictures(), METRICS, lambda *_: None)


@given(st.integers(1, 60), st.integers(1, 80))
def test_images_are_taken_at_even_distances(there, wanted):
    images = [image(place % 256) for place in range(there)]
    places = [images.index(one) for one in evenly(images, wanted)]
    assert len(places) == min(there, wanted)
    assert places == sorted(set(places))
    gaps = np.diff([*places, there])
    assert gaps.max() - gaps.min() <= 1


def test_classes_are_found_by_name_and_then_by_number():
    assert class_numbers(["dog", "cat", "dog", "3", "1", None], Preparation.labels) == {
        "dog": 1,
        "cat": 0,
        "3": 2,
        "1": 1,
        None: -1,
    }
    for odd in ("wolf", "4", "²", "-1"):
        with pytest.raises(RecipeError, match=rf"none of the model's 3 \(cat, dog, 3\), found '{odd}'; name folders"):
            class_numbers(["cat", odd], Preparation.labels)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.sets(st.integers(0, 30)), st.integers(1, 12))
def test_what_is_learnt_from_was_never_judged(values, judged, samples):
    images = [image(value) for value in values]
    seen = Pictures(np.array(sorted(judged), np.float32).reshape(-1, 1, 1, 1), np.zeros(len(judged), np.int64))
    left = [value for value in values if value not in judged]
    if len(left) < samples:
        beside = f", besides {len(values) - len(left)} that the evaluation uses" if len(left) < len(values) else ""
        with pytest.raises(RecipeError, match=f"has {len(left)} images{beside}, found {samples}; lower"):
            unseen(images, Preparation(), seen, samples)
        return
    found = unseen(images, Preparation(), seen, samples)
    assert found.shape == (samples, 1, 1, 1)
    for value in found.flatten():
        left.remove(value)  # each at most as often as it is there
    assert np.array_equal(found, unseen(images, Preparation(), seen, samples))


def test_to_a_baseline_that_may_be_never_right_there_is_no_ratio():
    given = pictures(20)
    wrong = (given.labels + 1) % 3
    pixels = np.eye(3, 4, dtype=np.float32)[wrong].reshape(-1, 1, 2, 2)
    pixels[0] = np.eye(3, 4)[given.labels[0]].reshape(1, 2, 2)
    model = Linear(np.eye(4, 3))
    rarely = evaluate_classifier(model, model, Pictures(pixels, given.labels), METRICS, lambda *_: None)
    accuracy = rarely.metrics["accuracy"]
    assert (accuracy.baseline, accuracy.value, accuracy.ratio) == (0.05, 0.05, None)
