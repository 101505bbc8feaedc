"""Softmax of whole rows, a few rows at a time, so that what is in work stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK", "block_weights", "log_normalizers", "parts"]

BLOCK = 256
"""Tokens whose weights are summed in float32 before float64 takes over."""

_AT_ONCE = 1 << 19


def parts(rows: int, vocab: int) -> Iterator[slice]:
    """Rows in groups of about two megabytes of float32."""
    step = max(1, _AT_ONCE // vocab)
    return (slice(start, start + step) for start in range(0, rows, step))


def block_weights(
    logits: npt.NDArray[np.float32], temperature: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Softmax before normalization, where the most likely token weighs 1, in blocks of tokens.

    Args:
        logits: `[rows, vocabulary]` float32, of which at least one in each row is finite.
        temperature: `[rows]` float64, above 0.

    Returns:
        Weights `[rows, blocks, BLOCK]` float32, 0 beyond the vocabulary, and the running total of the blocks' sums
        `[rows, blocks]` float64. Both depend on a row alone, to the last bit.
    """
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    padded = np.empty((rows, blocks * BLOCK), dtype=np.float32)
    weights = padded[:, :vocab]
    with np.errstate(over="ignore"):  # to minus infinity, which weighs nothing
        np.subtract(logits, logits.max(axis=1, keepdims=True), out=weights)
        np.divide(weights, np.clip(temperature, 1e-30, 1e30).astype(np.float32)[:, None], out=weights)
    np.exp(weights, out=weights)
    padded[:, vocab:] = 0
    blocked = padded.reshape(rows, blocks, BLOCK)
    return blocked, np.cumsum(blocked.sum(axis=2).astype(np.float64), axis=1)


def log_normalizers(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The logarithm of the sum of all exponentials, `[rows]` float64."""
    _, totals = block_weights(logits, np.ones(len(logits)))
    found: npt.NDArray[np.float64] = logits.max(axis=1) + np.log(totals[:, -1])
    return found
