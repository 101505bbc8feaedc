"""Measuring encoders: embeddings of a text's paragraphs, and timed passes over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optkit.backends import AnySession, TensorSession
from optkit.bench import (
    EncodingArm,
    EncodingWorkload,
    Samples,
    SessionEncodingArm,
    TransformersEncodingArm,
    measure_encoding,
)
from optkit.datasets import Dataset
from optkit.engine.pooling import preparation_of
from optkit.errors import GateFailed
from optkit.evaluate import (
    Embedder,
    ModelEmbedder,
    Quality,
    RecordedEmbedder,
    SessionEmbedder,
    embedding_parity,
    evaluate_embeddings,
    every_sequence,
    paragraphs,
    sequences,
)
from optkit.measure.task import Demand, Task, Text, Told
from optkit.metrics import EmbeddingMetric, EncodingMetric, EncodingRun
from optkit.model import Model, ModelCard
from optkit.recipe import Benchmark, Evaluation, Gate, Recipe
from optkit.steps import Limits

__all__ = ["Encoding"]

_FLOAT = 4
_BASELINE_BATCH = 32
# Of a layer's activations per token, in units of the hidden size: what a feed-forward of four times that size and the
# attention before it hold at once.
_LIVE_WIDTHS = 16
_HEAD_SIZE = 32


class Encoding(Task[Embedder, EncodingArm]):
    """Encoders without a head, which are used for embeddings."""

    noun = "encoder"
    output = "hidden states"
    generates = False
    gates = (
        Gate(metric="embedding_cosine", at_least=0.95),
        Gate(metric="sequences_per_second", at_least="-5%"),
    )
    quality_metric = EmbeddingMetric
    speed_metric = EncodingMetric

    def scorer(self, model: Model) -> Embedder:
        return ModelEmbedder(model)

    def scorer_of_session(self, session: AnySession, weights: Path) -> Embedder:
        if not isinstance(session, TensorSession):
            raise GateFailed("the backend opened an encoder as another kind of model")
        return SessionEmbedder(session, weights)

    def scorer_of_arm(self, arm: EncodingArm) -> Embedder:
        if isinstance(arm, TransformersEncodingArm):
            assert arm.model is not None
            return ModelEmbedder(arm.model)
        assert isinstance(arm, SessionEncodingArm)
        return SessionEmbedder(arm.session, arm.weights)

    def recorded(self, scorer: Embedder, scratch: Path) -> Embedder:
        return RecordedEmbedder(scorer)

    def text(
        self, tokenizer: Any, files: Mapping[str, str], dataset: Dataset, tokens: int, context_length: int
    ) -> list[tuple[int, ...]]:
        return sequences(tokenizer, dataset, tokens, context_length, preparation_of(files))

    def samples(
        self, tokenizer: Any, files: Mapping[str, str], dataset: Dataset, length: int
    ) -> Iterator[tuple[int, ...]]:
        return every_sequence(tokenizer, dataset, length, preparation_of(files))

    def evaluate(
        self, baseline: Embedder, candidate: Embedder, text: Text, metrics: Mapping[str, EmbeddingMetric], told: Told
    ) -> Quality:
        return evaluate_embeddings(baseline, candidate, text, metrics, told)

    def parity(self, reference: Embedder, candidate: Embedder, text: Text) -> float:
        by_length = sorted(text, key=len)
        # One batch holds them: the shortest is padded most.
        return embedding_parity(reference, candidate, [by_length[0], by_length[len(text) // 2], by_length[-1]])

    def time(self, arms: Sequence[EncodingArm], text: Text, settings: Benchmark, told: Told) -> Samples[EncodingRun]:
        workload = EncodingWorkload(len(text), sum(map(len, text)), settings.blocks, settings.seed)
        return measure_encoding(arms, text, workload, told, again=arms[-1].name)

    def request(self, text: Text, settings: Benchmark) -> tuple[tuple[int, ...], int]:
        return max(text, key=len), 0

    def positions(self, recipe: Recipe) -> int:
        return 1  # its texts are cut at what there is

    def pieces(self, dataset: Dataset) -> Iterator[str]:
        return paragraphs(dataset)

    def tokens(self, evaluation: Evaluation) -> int:
        return evaluation.tokens

    def demand(
        self, recipe: Recipe, card: ModelCard, limits: Limits, token_seconds: float, cache_value_bytes: int
    ) -> Demand:
        longest = min(recipe.evaluation.context_length, limits.max_length)
        rows = max(_BASELINE_BATCH, limits.max_batch_size)
        activations = _LIVE_WIDTHS * card.hidden_size + 2 * card.hidden_size // _HEAD_SIZE * longest
        tokens = recipe.evaluation.tokens
        return Demand(
            # No more of a batch than there is text.
            memory_bytes=min(rows * longest, 2 * tokens) * activations * _FLOAT,
            disk_bytes=0,
            # Two runs a block for the baseline, and for both arms of the optimized model.
            benchmark_seconds=6 * recipe.benchmark.blocks * tokens * token_seconds,
        )
