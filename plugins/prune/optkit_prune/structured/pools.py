"""How many of which structures stay, from numbers alone: shares, steps and budgets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from optkit.errors import RecipeError

__all__ = [
    "MOST",
    "Cost",
    "Kept",
    "Pool",
    "Term",
    "by_ratio",
    "by_share",
    "number_of",
    "smallest_share",
    "totals",
    "whole",
]

MOST = 0.95
"""The largest share that may go."""

Kept = Mapping[str, int]
"""How many units of each pool stay, by its key."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
# Of a ratio of heads, so that 0.33 means one of three.
_ROUNDED = 0.005


@dataclass(frozen=True, slots=True)
class Pool:
    """Units of which some may go: the channels of an FFN, the heads of an attention.

    Attributes:
        key: names it among a model's pools, such as `ffn model.layers.0`.
        part: `ffn`, `heads`, `width` or `channels`.
        units: how many there are.
        step: so many go or stay together: what stays is a multiple of it.
        rows: as many stay of each of so many equal rows of units, of the query heads of each KV head.
        shared: whether the units are query heads that share KV heads, which all stay.
    """

    key: str
    part: str
    units: int
    step: int
    rows: int = 1
    shared: bool = False

    @property
    def most(self) -> int:
        """The largest multiple of `step`."""
        return self.units // self.step * self.step

    def left(self, share: float) -> int:
        """How many stay where at least that share goes; one step at least."""
        return max(self.step, math.floor((1 - share) * self.units / self.step + 1e-9) * self.step)


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor of a model, and how it shrinks with the pools.

    Attributes:
        sizes: its shape.
        pools: for each axis the pools whose units lie along it, and how many entries those of a pool have together.
        runs: how often a number in it is multiplied, in one run of the model or for one token.
    """

    sizes: tuple[int, ...]
    pools: tuple[tuple[tuple[Pool, int], ...], ...]
    runs: float = 0.0

    def shape(self, kept: Kept) -> tuple[int, ...]:
        """With what stays."""
        return tuple(
            size - sum(entries // pool.units * (pool.units - kept[pool.key]) for pool, entries in pools)
            for size, pools in zip(self.sizes, self.pools, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """What a budget is of: the parameters, or the multiplications of linear layers and convolutions."""

    terms: Sequence[Term]
    flops: bool = False

    def of(self, kept: Kept) -> float:
        """Parameters, or multiplications, with what stays."""
        return sum(math.prod(term.shape(kept)) * (term.runs if self.flops else 1) for term in self.terms)


def by_ratio(pools: Iterable[Pool], ratio: float) -> dict[str, int]:
    """What stays if that share of each pool goes, rounded to the nearest step; of heads nothing is rounded.

    Raises:
        RecipeError: nothing would go, or all, or no whole number of heads is such a share.
    """
    kept: dict[str, int] = {}
    for pool in pools:
        left = math.floor((1 - ratio) * pool.units / pool.step + 0.5) * pool.step
        if pool.part == "heads":
            _check_heads(pool, ratio, left)
        elif not 0 < left < pool.units:
            what = "leaves none" if left <= 0 else "removes none"
            remedy = "lower ratio or round_to" if left <= 0 else "raise ratio, or lower round_to"
            raise RecipeError(
                f"ratio {what} of the {pool.units} of {pool.key}, in steps of {pool.step}", found=ratio, remedy=remedy
            )
        kept[pool.key] = left
    return kept


def _check_heads(pool: Pool, ratio: float, left: int) -> None:
    if 0 < left < pool.units and abs(1 - left / pool.units - ratio) <= _ROUNDED:
        return
    one = "KV head" if pool.shared else "attention"
    count = pool.units // pool.rows
    fitting = [gone for gone in range(1, count) if gone / count <= MOST]
    if not fitting:
        raise RecipeError(
            f"heads: {pool.key.partition(' ')[2]} has one for each {one}, of which none can go",
            remedy="leave heads out of parts" + (", or set kv_groups" if pool.shared else ""),
        )
    near = sorted(sorted(fitting, key=lambda gone: abs(gone / count - ratio))[:2])
    choices = " or ".join(f"{gone / count:.3g}" for gone in near)
    raise RecipeError(
        f"ratio is no whole number of the {count} heads of each {one}", found=ratio, remedy=f"choose {choices}"
    )


def by_share(pools: Iterable[Pool], share: float) -> dict[str, int]:
    """What stays if at least that share of each pool goes, as far as a step of each has to stay."""
    return {pool.key: pool.left(share) for pool in pools}


def smallest_share(pools: Sequence[Pool], fits: Callable[[float], bool]) -> float | None:
    """The smallest share of each pool that has to go for `fits` to hold, by bisection; None if 95% is not enough.

    Args:
        pools: between whose steps nothing changes.
        fits: once it holds, it holds for all larger shares.
    """
    steps = {(pool.units, pool.step) for pool in pools}
    shares = {1 - left / units for units, step in steps for left in range(step, units + 1, step)}
    choices = sorted(share for share in shares if 0 < share <= MOST + 1e-9)
    low, high = 0, len(choices)
    while low < high:
        middle = (low + high) // 2
        if fits(choices[middle]):
            high = middle
        else:
            low = middle + 1
    return choices[low] if low < len(choices) else None


def totals(pools: Iterable[Pool], kept: Kept) -> dict[str, int]:
    """How many units of each part stay."""
    found: dict[str, int] = {}
    for pool in pools:
        found[pool.part] = found.get(pool.part, 0) + kept[pool.key]
    return found


def number_of(budget: str) -> float | None:
    """A share between 0 and 1, a number of at least 1, or None for neither."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[KMB]?)", budget)
    if found is None:
        return None
    number = float(found[1]) * (0.01 if found[2] == "%" else _UNITS[found[2]])
    return number if (0 < number < 1 if found[2] == "%" else number >= 1) else None


def whole(pools: Iterable[Pool]) -> Kept:
    """All units of all pools."""
    return {pool.key: pool.units for pool in pools}
