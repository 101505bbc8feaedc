"""The kinds of models that can be measured."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from optkit.measure.encoding import Encoding
from optkit.measure.generation import Generation
from optkit.measure.task import Task
from optkit.weights import FEATURE_EXTRACTION

__all__ = ["task_of"]


def task_of(tags: Collection[str]) -> Task[Any, Any]:
    """The task of a model with these tags."""
    return Encoding() if FEATURE_EXTRACTION in tags else Generation()
