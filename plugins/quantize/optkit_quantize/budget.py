"""Choosing one option for each of many groups, so that costs and losses add up best: the multiple-choice knapsack."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["allocate", "bytes_of"]

_UNITS = {"MB": 1000**2, "GB": 1000**3, "MiB": 1024**2, "GiB": 1024**3}
_STATES = 20_000


def bytes_of(size: str) -> int:
    """The bytes that a size such as `90 MB` or `1.5GiB` stands for.

    Raises:
        ValueError: it is not spelt so, or is nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", size)
    found = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not found:
        raise ValueError(f'{size!r} is no size; write a number and MB, GB, MiB or GiB, such as "90 MB"')
    return found


def allocate(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    *,
    cost: int | None = None,
    loss: float | None = None,
) -> list[int] | None:
    """One option for each group: with the least total loss within a total cost, or the least cost within a total loss.

    Dynamic programming over the groups that keeps every sum of costs and losses which no other one beats in both. Exact
    while these are at most 20,000; beyond, sums whose costs differ by less than a 20,000th of their spread count as
    equal, and the one of least loss stays. Limits hold in either case.

    Args:
        costs: `[group][option]`, at least one of each.
        losses: likewise, not negative.
        cost: limit of the total cost; goes without `loss`.
        loss: limit of the total loss.

    Returns:
        The option of each group, or None if no choice keeps the limit.
    """
    # What the groups to come cost, or lose, at the least: sums that could never end within the limit are left out.
    rest_cost = _least_after(costs)
    rest_loss = _least_after(losses)
    total_costs, total_losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for index, (group_costs, group_losses) in enumerate(zip(costs, losses, strict=True)):
        options = len(group_costs)
        summed_costs = (total_costs[:, None] + np.asarray(group_costs, np.int64)).ravel()
        summed_losses = (total_losses[:, None] + np.asarray(group_losses, np.float64)).ravel()
        within = (
            summed_costs + rest_cost[index] <= cost
            if cost is not None
            else summed_losses + rest_loss[index] <= (np.inf if loss is None else loss * (1 + 1e-12))
        )
        kept = np.flatnonzero(within)
        kept = kept[_frontier(summed_costs[kept], summed_losses[kept])]
        if not len(kept):
            return None
        total_costs, total_losses = summed_costs[kept], summed_losses[kept]
        steps.append((kept // options, kept % options))
    # Sorted by cost, and losses fall along it.
    place = len(total_costs) - 1 if cost is not None else 0
    chosen = []
    for before, option in reversed(steps):
        chosen.append(int(option[place]))
        place = int(before[place])
    return chosen[::-1]


def _least_after(table: Sequence[Sequence[float]]) -> list[float]:
    """For each group, the sum of the smallest entries of all groups after it."""
    sums, total = [], 0.0
    for row in reversed(table):
        sums.append(total)
        total += min(row)
    return sums[::-1]


def _frontier(costs: npt.NDArray[np.int64], losses: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Places of the sums that no other one beats, by rising cost."""
    order = np.lexsort((losses, costs))
    if len(order) > 1:
        lowest = np.minimum.accumulate(losses[order])
        order = order[np.append(True, losses[order][1:] < lowest[:-1])]
    if len(order) > _STATES:
        spread = int(costs[order[-1]] - costs[order[0]]) + 1
        buckets = (costs[order] - costs[order[0]]) * _STATES // spread
        # The last of a bucket has the least loss in it.
        order = order[np.append(buckets[1:] != buckets[:-1], True)]
    return order
