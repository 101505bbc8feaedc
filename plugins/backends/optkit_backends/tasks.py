"""Which models a backend runs, by their task."""

from __future__ import annotations

from collections.abc import Set

from optkit.backends import Lowering
from optkit.weights import CAUSAL_LM, FEATURE_EXTRACTION, IMAGE_CLASSIFICATION

__all__ = ["ONE_CALL", "other_task"]

ONE_CALL = frozenset({FEATURE_EXTRACTION, IMAGE_CLASSIFICATION})
"""Of models that answer in one call, without a KV cache; see `optkit_backends.positional.call_of`."""
_EVERY = ONE_CALL | {CAUSAL_LM}


def other_task(tags: Set[str], runs: Set[str] = _EVERY, reason: str = "") -> dict[str, Lowering]:
    """That nothing can run the model, where its task is none of these; else nothing.

    Args:
        tags: of the model.
        runs: tasks that the backend runs.
        reason: why it runs no others.
    """
    if tags & runs:
        return {}
    task = next((tag for tag in sorted(tags) if tag.startswith("task:")), "task:unknown")
    reason = reason or "only language models, encoders and image classifiers run on it"
    return {task: Lowering("", native=False, reason=reason)}
