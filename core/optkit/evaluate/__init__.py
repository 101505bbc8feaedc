"""Quality of a model beside the unoptimized one, on the same data: by token, by embedding, or by image."""

from optkit.evaluate.classifying import (
    Classifier,
    ModelClassifier,
    RecordedClassifier,
    SessionClassifier,
    classification_parity,
    evaluate_classifier,
)
from optkit.evaluate.embedding import (
    Embedder,
    ModelEmbedder,
    RecordedEmbedder,
    SessionEmbedder,
    embedding_parity,
    evaluate_embeddings,
)
from optkit.evaluate.images import Pictures, class_numbers, evenly, prepared, unseen
from optkit.evaluate.judge import Figure, Quality, evaluate, parity
from optkit.evaluate.scorers import EngineScorer, ModelScorer, Recorded, Scorer, SessionScorer
from optkit.evaluate.text import every_sequence, every_window, held_out, paragraphs, sequences, windows

__all__ = [
    "Classifier",
    "Embedder",
    "EngineScorer",
    "Figure",
    "ModelClassifier",
    "ModelEmbedder",
    "ModelScorer",
    "Pictures",
    "Quality",
    "Recorded",
    "RecordedClassifier",
    "RecordedEmbedder",
    "Scorer",
    "SessionClassifier",
    "SessionEmbedder",
    "SessionScorer",
    "class_numbers",
    "classification_parity",
    "embedding_parity",
    "evaluate",
    "evaluate_classifier",
    "evaluate_embeddings",
    "evenly",
    "every_sequence",
    "every_window",
    "held_out",
    "paragraphs",
    "parity",
    "prepared",
    "sequences",
    "unseen",
    "windows",
]
