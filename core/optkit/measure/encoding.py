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
    measure_passes,
)
from optkit.datasets import TextDataset
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
from optkit.measure.task import Amount, Demand, Told
from optkit.measure.texts import Reader, Text, TextTask, calibration_tokens
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


class Encoding(TextTask[Embedder, EncodingArm]):
    """Encoders without a head, which are used for embeddings."""

    noun = "encoder"
    output = "hidden states"
    generates = False
    needs_whole = False  # paragraphs may be as short as they like
    meaningless = (
        ("benchmark", "prompt_tokens"),
        ("benchmark", "output_tokens"),
        ("kv_cache_tokens",),
        ("evaluation", "images"),
    )
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

    def data(self, reader: Reader, dataset: TextDataset, amount: Amount, longest: int) -> Text:
        return sequences(reader.tokenizer, dataset, amount.tokens, longest, preparation_of(reader.files))

    def samples(self, reader: Reader, dataset: TextDataset, length: int) -> Iterator[tuple[int, ...]]:
        return every_sequence(reader.tokenizer, dataset, length, preparation_of(reader.files))

    def evaluate(
        self, baseline: Embedder, candidate: Embedder, data: Text, metrics: Mapping[str, EmbeddingMetric], told: Told
    ) -> Quality:
        return evaluate_embeddings(baseline, candidate, data, metrics, told)

    def parity(self, reference: Embedder, candidate: Embedder, data: Text) -> float:
        by_length = sorted(data, key=len)
        # One batch holds them: the shortest is padded most.
        return embedding_parity(reference, candidate, [by_length[0], by_length[len(data) // 2], by_length[-1]])

    def time(self, arms: Sequence[EncodingArm], data: Text, settings: Benchmark, told: Told) -> Samples[EncodingRun]:
        workload = EncodingWorkload(len(data), sum(map(len, data)), settings.blocks, settings.seed)
        return measure_passes(arms, data, workload, told, again=arms[-1].name)

    def request(self, data: Text, settings: Benchmark) -> dict[str, Any]:
        return {"sequence": max(data, key=len)}

    def positions(self, recipe: Recipe) -> int:
        return 1  # its texts are cut at what there is

    def pieces(self, dataset: TextDataset) -> Iterator[str]:
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
            evaluation_tokens=tokens,
            calibration_tokens=calibration_tokens(recipe, card),
            # Two runs a block for the baseline, and for both arms of the optimized model.
            benchmark_seconds=6 * recipe.benchmark.blocks * tokens * token_seconds,
        )

    def usage(self, artifact: Path) -> str:
        return f'Next, in Python: optkit.Encoder("{artifact}").encode(["Why is the sky blue?"])'
