"""Quality of a model beside the unoptimized one, on the same text, token by token."""

from optkit.evaluate.judge import Figure, Quality, evaluate, parity
from optkit.evaluate.scorers import ModelScorer, Recorded, Scorer, SessionScorer
from optkit.evaluate.text import windows

__all__ = [
    "Figure",
    "ModelScorer",
    "Quality",
    "Recorded",
    "Scorer",
    "SessionScorer",
    "evaluate",
    "parity",
    "windows",
]
