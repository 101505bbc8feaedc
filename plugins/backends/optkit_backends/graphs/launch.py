"""A step of a decoder as the tensors that its graph takes: packed tokens, places in the KV cache, and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optkit.steps import Row
from optkit_backends.torch.pool import BLOCK_SIZE, Pool

__all__ = ["Launch", "cache_of", "launches"]


def launches(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that run together: those with one new token and then one with several. Each other one runs alone."""
    single = [row for row in rows if len(row.tokens) == 1]
    several = [row for row in rows if len(row.tokens) > 1]
    return [[*single, *several[:1]], *([row] for row in several[1:])]


def cache_of(pool: Pool) -> list[Tensor]:
    """Keys and values of each layer in turn, as a graph takes them after a launch."""
    return [tensor for pair in zip(pool.keys, pool.values, strict=True) for tensor in pair]


@dataclass(frozen=True, slots=True)
class Launch:
    """What one run of a graph takes besides the KV cache. `rows` with one new token, and perhaps one with more.

    No size is 0, which kernels and compilers of graphs get wrong: where there is no row of a kind, the first token
    attends to itself once more and the result is left out, and where no logits are wanted, one comes for nothing.
    """

    tokens: Tensor
    """`[1, tokens]` int64, of all rows one after another."""
    positions: Tensor
    """`[1, tokens]` int64, each in its own sequence."""
    written: Tensor
    """`[tokens]` int64: places of their keys and values."""
    wanted: Tensor
    """`[logits]` int64: the tokens that need logits."""
    single: Tensor
    """`[rows]` int64: the tokens of the rows that have one."""
    decoding: Tensor
    """`[rows, length]` int64: the places that each of them sees. Padding repeats its own last one."""
    several: Tensor
    """`[chunk]` int64: the tokens of the row that has several."""
    chunk: Tensor
    """`[chunk length]` int64: the places that they see."""
    order: Tensor
    """`[tokens]` int64: where what each token gets stands, in that of `single` and then `several`."""
    masks: list[Tensor]
    """For each window, to add to scores: `[rows, 1, 1, length]` and `[chunk, chunk length]` float32."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (
            *(self.tokens, self.positions, self.written, self.wanted),
            *(self.single, self.decoding, self.several, self.chunk, self.order),
            *self.masks,
        )

    @classmethod
    def of(cls, rows: Sequence[Row], windows: Sequence[int | None]) -> Launch:
        """The tensors of some rows, for a model whose layers have these windows."""
        counts = np.array([len(row.tokens) for row in rows])
        computed = np.array([row.computed for row in rows])
        starts = counts.cumsum() - counts
        owners = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(owners)) + np.repeat(computed - starts, counts)
        table = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
        for index, row in enumerate(rows):
            table[index, : len(row.blocks)] = row.blocks

        def places(owners: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return table[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE

        alone = int(np.sum(counts == 1))
        written, single, several = places(owners, positions), np.arange(alone), np.arange(alone, len(owners))
        last, asking = computed[:alone, None], positions[alone:, None]
        if alone:
            seen = np.arange(last.max() + 1)
            decoding = places(single[:, None], np.minimum(seen, last))
        else:
            single, last, seen = np.zeros(1, np.int64), positions[:1, None], positions[:1]
            decoding = np.array([[written[0]]])
        if len(several):
            read = np.arange(positions[-1] + 1)
            chunk = places(np.full(len(read), len(rows) - 1), read)
        else:
            several, asking, read, chunk = np.zeros(1, np.int64), positions[:1, None], positions[:1], written[:1]
        masks = []
        for window in windows:
            masks += [_mask(last, seen, window)[:, None, None], _mask(asking, read, window)]
        wanted = [start + place for row, start in zip(rows, starts.tolist(), strict=True) for place in row.wanted]
        return cls(
            torch.tensor([[token for row in rows for token in row.tokens]]),
            torch.tensor(positions[None]),
            torch.tensor(written),
            torch.tensor(wanted or [0]),
            torch.tensor(single),
            torch.tensor(decoding),
            torch.tensor(several),
            torch.tensor(chunk),
            torch.arange(len(owners)) + (0 if alone else 1),
            masks,
        )


def _mask(asking: npt.NDArray[np.int64], seen: npt.NDArray[np.int64], window: int | None) -> Tensor:
    """Of positions `[tokens, 1]` that look at positions `[length]`: `[tokens, length]`."""
    visible = seen <= asking
    if window is not None:
        visible &= seen > asking - window
    return torch.tensor(np.where(visible, np.float32(0), np.float32("-inf")))
