"""From logits to tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from optkit.engine.request import SamplingParams

__all__ = ["sample"]


def sample(logits: npt.NDArray[np.float32], params: Seq[SamplingParams], positions: Seq[int]) -> list[int]:
    """One token for each row.

    Args:
        logits: `[rows, vocabulary]` float32.
        params: how each row is sampled.
        positions: the position that each row's token will take; with the seed it fixes the draw.
    """
    tokens: list[int] = logits.argmax(axis=-1).tolist()
    for row, (wish, position) in enumerate(zip(params, positions, strict=True)):
        if wish.temperature > 0:
            tokens[row] = _draw(logits[row], wish, position)
    return tokens


def _draw(logits: npt.NDArray[np.float32], params: SamplingParams, position: int) -> int:
    scaled = logits.astype(np.float64) / params.temperature
    probabilities = np.exp(scaled - scaled.max())
    order = np.argsort(-probabilities, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    # The token that crosses the threshold belongs to the nucleus, so the count is one past the last that stays below.
    kept = int(np.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1
    kept = min(kept, len(order))
    generator = np.random.Generator(np.random.Philox(key=params.seed, counter=position))
    point = generator.random() * cumulative[kept - 1]
    return int(order[min(int(np.searchsorted(cumulative[:kept], point, side="right")), kept - 1)])
