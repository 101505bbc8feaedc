"""Quality of a model beside the unoptimized one, on the same text: token by token, or embedding by embedding."""

from optkit.evaluate.embedding import (
    Embedder,
    ModelEmbedder,
    RecordedEmbedder,
    SessionEmbedder,
    embedding_parity,
    evaluate_embeddings,
)
from optkit.evaluate.judge import Figure, Quality, evaluate, parity
from optkit.evaluate.scorers import EngineScorer, ModelScorer, Recorded, Scorer, SessionScorer
from optkit.evaluate.text import every_sequence, every_window, held_out, paragraphs, sequences, windows

__all__ = [
    "Embedder",
    "EngineScorer",
    "Figure",
    "ModelEmbedder",
    "ModelScorer",
    "Quality",
    "Recorded",
    "RecordedEmbedder",
    "Scorer",
    "SessionEmbedder",
    "SessionScorer",
    "embedding_parity",
    "evaluate",
    "evaluate_embeddings",
    "every_sequence",
    "every_window",
    "held_out",
    "paragraphs",
    "parity",
    "sequences",
    "windows",
]
