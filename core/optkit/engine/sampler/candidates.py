"""The most likely tokens of each row, found without sorting the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Candidates", "most_likely"]

_GROUPS = 4
"""Groups of tokens for each token that is wanted: with random logits a third more than wanted come out."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Some tokens of each row: every one whose logit is at least the row's threshold."""

    tokens: npt.NDArray[np.int64]
    """`[rows, width]`, ascending; 0 beyond the row's number."""
    logits: npt.NDArray[np.float32]
    """`[rows, width]`; minus infinity beyond the row's number."""
    numbers: npt.NDArray[np.int64]
    """`[rows]`: how many there are. 0 where there were more than the limit."""
    complete: npt.NDArray[np.bool_]
    """`[rows]`: whether these are all tokens that are possible at all."""


def most_likely(logits: npt.NDArray[np.float32], wanted: int, limit: int | None = None) -> Candidates:
    """At least the `wanted` most likely tokens of each row, with all that tie with the last of them.

    Args:
        logits: `[rows, vocabulary]` float32.
        wanted: if this is much of the vocabulary, all possible tokens come out.
        limit: rows with more candidates, which ties make, have none.
    """
    rows, vocab = logits.shape
    lowest = np.finfo(np.float32).min
    thresholds = np.full(rows, lowest)
    columns = max(_GROUPS * wanted, 1024)
    if 2 * columns <= vocab:
        # Each group's largest logit is another token, so the wanted-th largest of these is at most the one in question.
        whole = vocab // columns * columns
        largest = logits[:, :whole].reshape(rows, -1, columns).max(axis=1)
        rest = logits[:, whole:]
        np.maximum(largest[:, : rest.shape[1]], rest, out=largest[:, : rest.shape[1]])
        found = np.partition(largest, columns - wanted, axis=1)[:, columns - wanted]
        thresholds = np.maximum(thresholds, found)
    row, token = np.divmod(np.flatnonzero(logits >= thresholds[:, None]), vocab)
    numbers = np.bincount(row, minlength=rows)
    complete = thresholds == lowest
    if limit is not None and numbers.max(initial=0) > limit:
        fits = numbers <= limit
        keep = fits[row]
        row, token, numbers, complete = row[keep], token[keep], numbers * fits, complete & fits
    place = np.arange(len(row)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    shape = rows, int(numbers.max(initial=0))
    tokens, chosen = np.zeros(shape, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
    tokens[row, place] = token
    chosen[row, place] = logits[row, token]
    return Candidates(tokens, chosen, numbers, complete)
