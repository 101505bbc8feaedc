"""A step of a decoder as the tensors that its archive takes: packed tokens, places in the KV cache, and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optkit.steps import Row
from optkit_backends.torch.pool import BLOCK_SIZE

__all__ = ["Launch", "launches"]


def launches(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that run together: those with one new token and then one with several. Each other one runs alone."""
    single = [row for row in rows if len(row.tokens) == 1]
    several = [row for row in rows if len(row.tokens) > 1]
    return [[*single, *several[:1]], *([row] for row in several[1:])]


@dataclass(frozen=True, slots=True)
class Launch:
    """What one run of the archive takes besides the KV cache. `rows` with one new token, and perhaps one with more."""

    tokens: Tensor
    """`[1, tokens]` int64, of all rows one after another."""
    positions: Tensor
    """`[1, tokens]` int64, each in its own sequence."""
    written: Tensor
    """`[tokens]` int64: places of their keys and values."""
    wanted: Tensor
    """`[logits]` int64: the tokens that need logits."""
    decoding: Tensor
    """`[rows, length]` int64: the places that each row of one token sees. Padding repeats its own last one."""
    chunk: Tensor
    """`[length]` int64: the places that the last row's several tokens see."""
    masks: list[Tensor]
    """For each window, to add to scores: `[rows, 1, 1, length]` and `[tokens, length]` float32."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tokens, self.positions, self.written, self.wanted, self.decoding, self.chunk, *self.masks)

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

        def places(owners: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(table[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)

        single = np.flatnonzero(counts == 1)
        last = computed[single][:, None]
        seen = np.arange(last.max() + 1 if len(single) else 0)
        decoding = places(single[:, None], np.minimum(seen, last))
        asking, read = np.arange(0)[:, None], np.arange(0)
        if counts[-1] > 1:
            read = np.arange(computed[-1] + counts[-1])
            asking = np.arange(computed[-1], computed[-1] + counts[-1])[:, None]
        masks: list[Tensor] = []
        for window in windows:
            masks.append(_mask(last, seen, window)[:, None, None])
            masks.append(_mask(asking, read, window))
        wanted = [start + place for row, start in zip(rows, starts.tolist(), strict=True) for place in row.wanted]
        return cls(
            torch.tensor([[token for row in rows for token in row.tokens]]),
            torch.from_numpy(positions)[None],
            places(owners, positions),
            torch.tensor(wanted, dtype=torch.long),
            decoding,
            places(np.full(len(read), len(rows) - 1), read),
            masks,
        )


def _mask(asking: npt.NDArray[np.int64], seen: npt.NDArray[np.int64], window: int | None) -> Tensor:
    """Of positions `[tokens, 1]` that look at positions `[length]`: `[tokens, length]`."""
    visible = seen <= asking
    if window is not None:
        visible &= seen > asking - window
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf")))
