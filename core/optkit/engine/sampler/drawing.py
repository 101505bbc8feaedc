"""Random choice of one token for each row. A row's token depends on the row alone, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optkit.engine.sampler.candidates import Candidates, most_likely
from optkit.engine.sampler.weights import BLOCK, block_weights, parts

__all__ = ["Filters", "draw"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

_TRIES = 256, 1024, 4096
"""Candidates among which the kept tokens are looked for, before all of the vocabulary is sorted."""


@dataclass(frozen=True, slots=True)
class Filters:
    """How rows are drawn: arrays `[rows]`, as `SamplingParams` says, temperatures above 0."""

    temperature: Floats
    top_k: Integers
    top_p: Floats
    min_p: Floats

    def __getitem__(self, rows: npt.NDArray[np.generic] | slice) -> Filters:
        return Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows])


def draw(logits: Logits, filters: Filters, points: Floats) -> Integers:
    """One token for each row.

    Args:
        logits: `[rows, vocabulary]` float32, of which at least one in each row is finite and none plus infinity.
        filters: for each row.
        points: `[rows]` float64 in [0, 1); the token is where the cumulative distribution passes it.
    """
    tokens = np.empty(len(logits), dtype=np.int64)
    filtered = (filters.top_k > 0) | (filters.top_p < 1) | (filters.min_p > 0)
    for choose, which in ((_draw_from_all, ~filtered), (_draw_from_likely, filtered)):
        if which.all():
            return choose(logits, filters, points)
        if which.any():
            tokens[which] = choose(logits[which], filters[which], points[which])
    return tokens


def _draw_from_all(logits: Logits, filters: Filters, points: Floats) -> Integers:
    """In the order of token ids: first the block in which the point lies, then the token."""
    tokens = np.empty(len(logits), dtype=np.int64)
    for part in parts(*logits.shape):
        weights, totals = block_weights(logits[part], filters.temperature[part])
        target = points[part] * totals[:, -1]
        rows = np.arange(len(target))
        block = _passed(totals, target)
        before = np.where(block > 0, totals[rows, block - 1], 0)
        share = (target - before) / (totals[rows, block] - before)
        running = np.cumsum(weights[rows, block], axis=1, dtype=np.float64)
        tokens[part] = block * BLOCK + _passed(running, share * running[:, -1])
    return tokens


def _passed(running: Floats, target: Floats) -> Integers:
    """Where each row's running total first exceeds the target; at the latest where it reaches its end."""
    first = np.count_nonzero(running <= target[:, None], axis=1)
    last = np.count_nonzero(running < running[:, -1:], axis=1)
    found: Integers = np.minimum(first, last)
    return found


def _draw_from_likely(logits: Logits, filters: Filters, points: Floats) -> Integers:
    """In the order of likelihood, of which the filters keep a beginning."""
    tokens = np.empty(len(logits), dtype=np.int64)
    totals = _totals(logits, filters)
    left = np.arange(len(logits))
    for wanted in _TRIES:
        among = most_likely(logits if len(left) == len(logits) else logits[left], wanted, limit=4 * wanted)
        certain, found = _draw_among(among, filters[left], totals[left], points[left])
        tokens[left[certain]] = found[certain]
        left = left[~certain]
        if not len(left):
            return tokens
    for part in parts(len(left), logits.shape[1]):
        some = left[part]
        among = most_likely(logits[some], logits.shape[1])
        tokens[some] = _draw_among(among, filters[some], totals[some], points[some])[1]
    return tokens


def _totals(logits: Logits, filters: Filters) -> Floats:
    """The whole weight of each row that top_p needs it for; top_k in front of it leaves only what is in sight."""
    totals = np.full(len(logits), np.nan)
    needed = np.flatnonzero((filters.top_p < 1) & (filters.top_k == 0))
    for part in parts(len(needed), logits.shape[1]):
        some = needed[part]
        totals[some] = block_weights(logits[some], filters.temperature[some])[1][:, -1]
    return totals


def _draw_among(
    among: Candidates, filters: Filters, totals: Floats, points: Floats
) -> tuple[npt.NDArray[np.bool_], Integers]:
    """Which rows have all that the filters keep among their candidates, and the tokens of these."""
    numbers, limited = among.numbers, filters.top_k > 0
    certain = among.complete | (limited & (filters.top_k <= numbers))
    if not among.logits.shape[1]:
        return certain, np.zeros(len(numbers), dtype=np.int64)
    rows = np.arange(len(numbers))
    ranked = -np.sort(-among.logits, axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # rows without candidates are all minus infinity
        scaled = (ranked.astype(np.float64) - ranked[:, :1]) / filters.temperature[:, None]
    weights = np.exp(scaled)
    running = np.cumsum(weights, axis=1)
    kept = np.where(limited, np.minimum(filters.top_k, numbers), numbers)
    totals = np.where(limited, running[rows, kept - 1], totals)
    # The token that crosses the threshold belongs to the nucleus, so the number is one past those that stay below.
    below = np.count_nonzero(running < (filters.top_p * totals)[:, None], axis=1)
    kept = np.where(filters.top_p < 1, np.minimum(kept, below + 1), kept)
    kept = np.minimum(kept, np.count_nonzero(weights >= filters.min_p[:, None], axis=1))
    # Unless top_p went by the total of a top_k that reaches out of sight.
    certain |= (kept < numbers) & ~(limited & (filters.top_p < 1))
    target = points * running[rows, kept - 1]
    rank = np.minimum(np.count_nonzero(running <= target[:, None], axis=1), kept - 1)
    # Of tokens that tie, the lower id ranks first.
    drawn = ranked[rows, rank][:, None]
    nth = rank - np.count_nonzero(ranked > drawn, axis=1)
    matches = np.cumsum(among.logits == drawn, axis=1)
    return certain, among.tokens[rows, np.argmax(matches > nth[:, None], axis=1)]
