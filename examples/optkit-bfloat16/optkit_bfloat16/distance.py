"""How far two models' next-token distributions are from each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from optkit.metrics import TokenMetric

__all__ = ["TotalVariation"]

Floats = npt.NDArray[np.float32]


class TotalVariation(TokenMetric):
    """Mean total variation distance of the next-token distributions: how often the two models draw different tokens.

    Between 0 and 1: `1 - sum(min(p, q))` is the smallest share of draws that can differ when one token is sampled from
    each distribution, and the share of drafted tokens that speculative sampling rejects.

    Source: Leviathan, Kalman and Matias, Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192,
    corollary 3.6.
    """

    unit = ""
    better = "lower"
    relative = False

    def per_token(self, logits: Floats, baseline: Floats, targets: npt.NDArray[np.int64]) -> Floats:
        """The distance at each position."""
        # Position by position: a vocabulary in float64 fits the processor's cache, all positions do not.
        pairs = zip(logits, baseline, strict=True)
        return np.array([_half_l1(_softmax(one), _softmax(other)) for one, other in pairs], np.float32)

    def aggregate(self, values: Floats) -> float:
        return float(np.mean(values, dtype=np.float64))


def _softmax(logits: Floats) -> npt.NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


def _half_l1(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(np.abs(one - other).sum() / 2)
