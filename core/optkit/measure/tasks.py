"""The kinds of models that can be measured."""

from __future__ import annotations

from collections.abc import Collection

from optkit.measure.classification import Classification
from optkit.measure.encoding import Encoding
from optkit.measure.figures import made_without_options
from optkit.measure.generation import Generation
from optkit.measure.task import AnyTask
from optkit.metrics import FootprintMetric, Metric
from optkit.weights import CAUSAL_LM, FEATURE_EXTRACTION, IMAGE_CLASSIFICATION

__all__ = ["measurable", "task_of"]

_TASKS: dict[str, AnyTask] = {
    CAUSAL_LM: Generation(),
    FEATURE_EXTRACTION: Encoding(),
    IMAGE_CLASSIFICATION: Classification(),
}


def task_of(tags: Collection[str]) -> AnyTask:
    """The task of a model with these tags; without one of a task it is taken for a causal language model."""
    return next((task for tag, task in _TASKS.items() if tag in tags), _TASKS[CAUSAL_LM])


def measurable(metric: type[Metric]) -> bool:
    """Whether there is a way to measure it: for one of the tasks, and without options."""
    shapes = [shape for task in _TASKS.values() for shape in (task.quality_metric, task.speed_metric)]
    return issubclass(metric, (FootprintMetric, *shapes)) and made_without_options(metric)
