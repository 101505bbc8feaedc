"""Keys and values of all layers, in blocks of a few tokens that belong to any sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optkit.backends import TokenSession
from optkit.steps import Caps, Limits
from optkit_backends.room import blocks_that_fit

__all__ = ["BLOCK_SIZE", "LayerShape", "Pool", "PooledSession"]

BLOCK_SIZE = 16
_DTYPES: dict[torch.dtype, type[np.generic]] = {torch.float32: np.float32, torch.bfloat16: np.int16}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: `heads` keys of `key_dim` numbers and as many values of `value_dim`."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32
    """Of the numbers; layers of one model have the same."""

    @property
    def block_bytes(self) -> int:
        return BLOCK_SIZE * self.heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Pool:
    """The KV cache: token `offset` of block `b` stands at place `b * BLOCK_SIZE + offset`.

    Memory is committed as it is written. What was never written is zero, so that it can be masked: NaN could not.

    Attributes:
        blocks: how many there are.
        keys: of each layer `[heads, places, key_dim]`: float32, bfloat16, or the bytes of a dtype of one byte as int8,
            because torch cannot index E4M3 numbers.
        values: of each layer `[heads, places, value_dim]`, likewise.
    """

    def __init__(self, layers: Sequence[LayerShape], blocks: int) -> None:
        self.blocks = blocks
        self.keys = [self._zeros(layer, layer.key_dim) for layer in layers]
        self.values = [self._zeros(layer, layer.value_dim) for layer in layers]

    @classmethod
    def within(cls, limits: Limits, layers: Sequence[LayerShape]) -> Pool:
        """One for a session that must hold `limits`.

        Raises:
            MachineError: it does not fit into free memory.
        """
        tokens, each = limits.kv_cache_tokens, -(-limits.max_length // BLOCK_SIZE)
        blocks = blocks_that_fit(
            limits,
            wanted=limits.max_batch_size * each if tokens is None else -(-tokens // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            block_bytes=sum(layer.block_bytes for layer in layers),
        )
        return cls(layers, blocks)

    def caps(self, limits: Limits, vocab_size: int) -> Caps:
        """Of a session over it, for steps of any mixture."""
        return Caps("paged", BLOCK_SIZE, self.blocks, limits.max_batch_size, True, vocab_size, limits.max_length)

    def _zeros(self, layer: LayerShape, dim: int) -> Tensor:
        # numpy's zeros are pages that the kernel gives when they are written; torch writes all of them at once.
        dtype = _DTYPES.get(layer.dtype, np.int8)
        made = torch.from_numpy(np.zeros((layer.heads, self.blocks * BLOCK_SIZE, dim), dtype))
        return made.view(layer.dtype) if dtype is np.int16 else made

    def read(self, blocks: Sequence[int]) -> npt.NDArray[np.generic]:
        """A copy of some blocks, `[blocks, numbers]`: layer by layer the keys, then the values likewise.

        bfloat16 comes as int16, since numpy has no such numbers.
        """
        ids = torch.tensor(blocks, dtype=torch.long)
        parts = [whole[:, ids].transpose(0, 1).flatten(1) for whole in self._by_block()]
        contents: npt.NDArray[np.generic] = torch.cat(parts, dim=1).numpy()
        return contents

    def write(self, blocks: Sequence[int], contents: npt.NDArray[np.generic]) -> None:
        """Put what `read` gave into blocks."""
        ids = torch.tensor(blocks, dtype=torch.long)
        given = torch.from_numpy(np.require(contents, None, ["C", "W"]))  # torch warns of read-only arrays
        start = 0
        for whole in self._by_block():
            heads, _, size = whole.shape
            part = given[:, start : start + heads * size]
            whole[:, ids] = part.reshape(len(blocks), heads, size).transpose(0, 1)
            start += heads * size

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the first block of each pair to the second."""
        sources, targets = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
        for whole in self._by_block():
            whole[:, targets] = whole[:, sources]

    def _by_block(self) -> list[Tensor]:
        """Views `[heads, blocks, numbers]`, of dtypes that numpy has."""
        return [
            (whole.view(torch.int16) if whole.dtype is torch.bfloat16 else whole).view(len(whole), self.blocks, -1)
            for whole in (*self.keys, *self.values)
        ]


class PooledSession(TokenSession):
    """A session whose keys and values are in a pool."""

    _pool: Pool

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.generic]:
        return self._pool.read(blocks)

    def write_blocks(self, blocks: Sequence[int], contents: npt.NDArray[np.generic]) -> None:
        self._pool.write(blocks, contents)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._pool.copy(pairs)
