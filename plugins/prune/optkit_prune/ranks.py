"""Ranks of layers that become products of two thin ones, from shapes and singular values alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

__all__ = ["allocate", "largest_rank", "rank_for"]

Shape = tuple[int, int]


def largest_rank(shape: Shape, round_to: int) -> int:
    """The largest multiple of `round_to` at which two factors have fewer weights than the layer; 0 if none has.

    Args:
        shape: `[out_features, in_features]`.
        round_to: ranks are multiples of it.
    """
    out, inputs = shape
    return (out * inputs - 1) // (out + inputs) // round_to * round_to


def rank_for(shape: Shape, ratio: float, round_to: int) -> int:
    """The largest multiple of `round_to` at which at least the share `ratio` of the weights goes; 0 if none is left."""
    out, inputs = shape
    # As much as a rounding error above a whole number is that number.
    return int((1 - ratio) * out * inputs / (out + inputs) / round_to * (1 + 1e-12)) * round_to


def allocate(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int) -> list[int]:
    """One option for each layer, so that the losses add up to little within a total cost.

    Options are taken one after another where they save most loss per cost, among those of each layer that no mixture of
    two others beats (the lower convex hull): what is left of `limit` is less than a single step of a layer.

    Args:
        costs: `[layer][option]`, rising.
        losses: likewise, falling.
        limit: at least the sum of the first costs.

    Returns:
        The option of each layer.
    """
    hulls = [_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    places = [0] * len(hulls)
    left = limit - sum(cost[0] for cost in costs)
    steps: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        hull, place = hulls[layer], places[layer]
        if place + 1 < len(hull):
            now, then = hull[place], hull[place + 1]
            gain = losses[layer][now] - losses[layer][then]
            heapq.heappush(steps, (-gain / (costs[layer][then] - costs[layer][now]), layer))

    for layer in range(len(hulls)):
        offer(layer)
    while steps:
        _, layer = heapq.heappop(steps)
        now, then = hulls[layer][places[layer]], hulls[layer][places[layer] + 1]
        price = costs[layer][then] - costs[layer][now]
        if price <= left:
            left -= price
            places[layer] += 1
            offer(layer)
    return [hull[place] for hull, place in zip(hulls, places, strict=True)]


def _hull(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """Options at the corners of the lower convex hull, by rising cost; the first is always one."""
    corners: list[int] = []
    for option in range(len(costs)):
        while len(corners) > 1 and not _bends(corners[-2], corners[-1], option, costs, losses):
            corners.pop()
        corners.append(option)
    return corners


def _bends(first: int, middle: int, last: int, costs: Sequence[int], losses: Sequence[float]) -> bool:
    """Whether the way to `last` over `middle` lies below the straight one."""
    straight = (losses[first] - losses[last]) * (costs[middle] - costs[first])
    return (losses[first] - losses[middle]) * (costs[last] - costs[first]) > straight
