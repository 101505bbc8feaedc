"""Metrics of quality: predictions beside what is true, predictions and embeddings beside the baseline's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from optkit.metrics import ClassificationMetric, EmbeddingMetric, TokenMetric

__all__ = [
    "Accuracy",
    "EmbeddingCosine",
    "EmbeddingCosineP01",
    "KLDivergence",
    "KLDivergenceP99",
    "LabelAgreement",
    "Perplexity",
    "Top1Agreement",
]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class Perplexity(TokenMetric):
    """`exp(mean(-log p(target)))`: between how many tokens the model wavers on average.

    Source: Jelinek, Mercer, Bahl and Baker, Perplexity, a measure of the difficulty of speech recognition (1977).
    """

    unit = ""
    better = "lower"

    def per_token(self, logits: Floats, baseline: Floats, targets: npt.NDArray[np.int64]) -> Floats:
        """The negative log-likelihood of each target, in nats."""
        values = np.empty(len(targets), np.float32)
        for rows in _chunks(logits):
            part = logits[rows].astype(np.float64)
            values[rows] = _log_sum_exp(part) - part[np.arange(len(part)), targets[rows]]
        return values

    def aggregate(self, values: Floats) -> float:
        return float(np.exp(np.mean(values, dtype=np.float64)))


class KLDivergence(TokenMetric):
    """Mean Kullback-Leibler divergence `KL(baseline || model)` of the next-token distributions, in nats.

    Source: Kullback and Leibler, On information and sufficiency (1951); as a measure of quantization damage:
    Dutta et al., Accuracy is not all you need, arXiv:2407.09141.
    """

    unit = "nat"
    better = "lower"
    relative = False

    def per_token(self, logits: Floats, baseline: Floats, targets: npt.NDArray[np.int64]) -> Floats:
        """The divergence at each position."""
        values = np.zeros(len(targets), np.float32)
        if logits is baseline:  # the baseline itself, which needs no sums over the vocabulary
            return values
        for rows in _chunks(logits):
            expected = baseline[rows].astype(np.float64)
            # The difference of logits before the normalizers: exactly 0 for equal models, small terms for similar ones.
            difference = expected - logits[rows]
            normalizer = _log_sum_exp(expected)
            shift = normalizer - _log_sum_exp(logits[rows].astype(np.float64))
            probabilities = np.exp(expected - normalizer[:, None])
            values[rows] = np.einsum("pv,pv->p", probabilities, difference) - shift
        # Rounding may leave -1e-17 where the divergence is 0; it is never negative.
        return values.clip(min=0)

    def aggregate(self, values: Floats) -> float:
        return float(np.mean(values, dtype=np.float64))


class KLDivergenceP99(KLDivergence):
    """The 99th percentile over positions of `KL(baseline || model)`, in nats: how bad the bad tokens are."""

    def aggregate(self, values: Floats) -> float:
        return float(np.quantile(values, 0.99))


class Top1Agreement(TokenMetric):
    """Fraction of positions where model and baseline find the same token most likely, as greedy decoding would."""

    unit = ""
    better = "higher"
    relative = False

    def per_token(self, logits: Floats, baseline: Floats, targets: npt.NDArray[np.int64]) -> Floats:
        """1 where they agree, else 0."""
        agreed: Floats = (logits.argmax(axis=-1) == baseline.argmax(axis=-1)).astype(np.float32)
        return agreed

    def aggregate(self, values: Floats) -> float:
        return float(np.mean(values, dtype=np.float64))


class EmbeddingCosine(EmbeddingMetric):
    """Mean cosine of the angle between a text's embedding and the baseline's, from -1 to 1.

    Search ranks by such cosines: what they move by, a ranking can move by. NaN where an embedding is 0.
    """

    unit = ""
    better = "higher"
    relative = False

    def per_sequence(self, embeddings: Floats, baseline: Floats) -> Floats:
        """The cosine of each sequence."""
        one, other = embeddings.astype(np.float64), baseline.astype(np.float64)
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        with np.errstate(invalid="ignore"):
            cosines: Floats = (np.einsum("sh,sh->s", one, other) / norms).clip(-1, 1).astype(np.float32)
        return cosines

    def aggregate(self, values: Floats) -> float:
        return float(np.mean(values, dtype=np.float64))


class EmbeddingCosineP01(EmbeddingCosine):
    """The 1st percentile over texts of the cosine to the baseline's embedding: how far off the worst texts are."""

    def aggregate(self, values: Floats) -> float:
        return float(np.quantile(values, 0.01))


class LabelAgreement(ClassificationMetric):
    """Fraction of images that model and baseline put into the same class. It needs no labels."""

    unit = ""
    better = "higher"
    relative = False

    def per_image(self, logits: Floats, baseline: Floats, labels: npt.NDArray[np.int64]) -> Floats:
        """1 where they agree, else 0."""
        agreed: Floats = (logits.argmax(axis=-1) == baseline.argmax(axis=-1)).astype(np.float32)
        return agreed

    def aggregate(self, values: Floats) -> float:
        return float(np.mean(values, dtype=np.float64))


class Accuracy(ClassificationMetric):
    """Top-1 accuracy: the fraction of images that the model puts into their true class. Not measured without labels."""

    unit = ""
    better = "higher"
    labelled = True

    def per_image(self, logits: Floats, baseline: Floats, labels: npt.NDArray[np.int64]) -> Floats:
        """1 where it is right, else 0."""
        right: Floats = (logits.argmax(axis=-1) == labels).astype(np.float32)
        return right

    def aggregate(self, values: Floats) -> float:
        return float(np.mean(values, dtype=np.float64))


def _chunks(logits: Floats, rows: int = 16) -> Iterator[slice]:
    """Few enough positions at once that their float64 copies stay in the processor's cache."""
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _log_sum_exp(values: Doubles) -> Doubles:
    largest = values.max(axis=-1)
    summed: Doubles = largest + np.log(np.exp(values - largest[:, None]).sum(axis=-1))
    return summed
