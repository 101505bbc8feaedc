"""Log probabilities, by the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from optkit.engine.request import TokenLogprob
from optkit.engine.sampler.candidates import most_likely
from optkit.engine.sampler.weights import log_normalizers, parts

__all__ = ["score"]


def score(logits: npt.NDArray[np.float32], targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log probability of one token in each position, and of the `top` most likely ones.

    Args:
        logits: `[positions, vocabulary]` float32.
        targets: the token of each position.
        top: 0 for none. Of tokens that tie, the lower id comes first.
    """
    wanted = np.asarray(targets, dtype=np.int64)
    scores: list[TokenLogprob] = []
    for part in parts(*logits.shape):
        rows, chosen = logits[part], wanted[part]
        normalizers = log_normalizers(rows)
        own = rows[np.arange(len(rows)), chosen] - normalizers
        best = _best(rows, normalizers, top) if top else [()] * len(rows)
        scores += map(TokenLogprob, chosen.tolist(), own.tolist(), best)
    return scores


def _best(
    logits: npt.NDArray[np.float32], normalizers: npt.NDArray[np.float64], top: int
) -> list[tuple[tuple[int, float], ...]]:
    among = most_likely(logits, top)
    order = np.argsort(-among.logits, axis=1, kind="stable")[:, :top]
    tokens = np.take_along_axis(among.tokens, order, axis=1).tolist()
    values = (np.take_along_axis(among.logits, order, axis=1) - normalizers[:, None]).tolist()
    return [
        tuple(zip(ids[:number], found[:number], strict=True))
        for ids, found, number in zip(tokens, values, among.numbers.tolist(), strict=True)
    ]
