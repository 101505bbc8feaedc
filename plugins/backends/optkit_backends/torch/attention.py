"""Attention over paged keys and values, for every transformers model that takes its attention function by name.

Paper: PagedAttention, arXiv:2309.06180.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from optkit.kv import compress, decompress
from optkit.steps import Row
from optkit_backends.torch.pool import BLOCK_SIZE, Pool

__all__ = ["PAGED", "Attention", "PagedAttention", "kept", "read"]

PAGED = "optkit_paged"
"""The name of the attention function. There is no mask function of this name, so transformers makes no mask."""

Integers = npt.NDArray[np.int64]
# Tokens that decoding rows gather at once: their keys and values are read again from the processor's cache.
GATHERED = 2048


class Attention(Protocol):
    """What every attention layer of a model calls; the module's caller passes it as `paged`."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Decoding:
    """Rows with one new token each, padded to the longest of them."""

    tokens: Tensor
    """`[rows]`: where their tokens stand on the packed axis."""
    places: Tensor
    """`[rows * length]`: what they see. Padding repeats a row's own last place, so rows never touch others' numbers."""
    mask: Tensor
    """`[rows, 1, 1, length]`, to add to scores."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A row with several new tokens."""

    tokens: slice
    """Where they stand on the packed axis."""
    places: Tensor
    """`[length]`: what the last of them sees, and more before it where there is a window."""
    mask: Tensor | None
    """`[tokens, length]`, to add to scores; None for a whole causal text."""


class PagedAttention:
    """Attention of one step: writes new keys and values, then lets each row see its own blocks and nothing else.

    Indices and masks are made once for all layers of a step. Query heads that share keys are computed as rows of one
    product or by views, so keys are never repeated in memory.

    Args:
        rows: of the step.
        pool: where the keys and values are.

    Attributes:
        tokens: `[1, tokens]`, those of all rows on one axis.
        positions: `[1, tokens]`, each in its own sequence.
    """

    def __init__(self, rows: Sequence[Row], pool: Pool) -> None:
        self._pool = pool
        self._counts = np.array([len(row.tokens) for row in rows])
        self._computed = np.array([row.computed for row in rows])
        self._ends = self._counts.cumsum()
        self._table = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
        for index, row in enumerate(rows):
            self._table[index, : len(row.blocks)] = row.blocks
        owners = np.repeat(np.arange(len(rows)), self._counts)
        positions = np.arange(len(owners)) + np.repeat(self._computed - self._ends + self._counts, self._counts)
        self.tokens = torch.tensor([[token for row in rows for token in row.tokens]])
        self.positions = torch.from_numpy(positions)[None]
        self._written = torch.from_numpy(self._places(owners, positions))
        self._parts: dict[int | None, list[_Decoding | _Chunk]] = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """`[tokens, heads, value_dim]` for `query`, `key` and `value` of `[heads, tokens, dim]`."""
        layer: Any = module.layer_idx
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        keys.index_copy_(1, self._written, kept(module, "k_scale", key))
        values.index_copy_(1, self._written, kept(module, "v_scale", value))
        (heads, tokens, _), shared = query.shape, len(keys)
        query = query.view(shared, heads // shared, tokens, -1)
        output = query.new_empty(tokens, heads, values.shape[-1])
        scale, window = options.get("scaling"), options.get("sliding_window")
        if window not in self._parts:
            self._parts[window] = self._plan(window)
        for part in self._parts[window]:
            seen = read(module, "k_scale", keys.index_select(1, part.places))
            content = read(module, "v_scale", values.index_select(1, part.places))
            if isinstance(part, _Decoding):
                rows = len(part.tokens)
                found = scaled_dot_product_attention(
                    query[:, :, part.tokens].permute(2, 0, 1, 3),
                    seen.view(shared, rows, -1, seen.shape[-1]).transpose(0, 1),
                    content.view(shared, rows, -1, content.shape[-1]).transpose(0, 1),
                    attn_mask=part.mask,
                    scale=scale,
                )
                output[part.tokens] = found.flatten(1, 2)
            else:
                group = heads // shared
                found = scaled_dot_product_attention(
                    query[:, :, part.tokens],
                    seen[:, None].expand(-1, group, -1, -1),
                    content[:, None].expand(-1, group, -1, -1),
                    attn_mask=part.mask,
                    is_causal=part.mask is None,
                    scale=scale,
                )
                output[part.tokens] = found.flatten(0, 1).transpose(0, 1)
        return output

    def _plan(self, window: int | None) -> list[_Decoding | _Chunk]:
        """How the rows attend in layers with this window."""
        first = np.zeros_like(self._computed) if window is None else np.maximum(0, self._computed + 1 - window)
        length = self._computed + self._counts - first
        parts: list[_Decoding | _Chunk] = [
            self._chunk(row, int(first[row]), int(length[row]), window)
            for row in np.flatnonzero(self._counts > 1).tolist()
        ]
        single = np.flatnonzero(self._counts == 1)
        single = single[np.argsort(-length[single], kind="stable")]
        while len(single):
            longest = length[single[0]]
            # Padding at most doubles what a row reads.
            alike = int(np.sum(2 * length[single] >= longest))
            together = single[: max(1, min(alike, GATHERED // longest))]
            parts.append(self._decoding(together, first[together], length[together]))
            single = single[len(together) :]
        return parts

    def _decoding(self, rows: Integers, first: Integers, length: Integers) -> _Decoding:
        steps = np.arange(length.max())
        positions = np.minimum(first[:, None] + steps, self._computed[rows, None])
        return _Decoding(
            torch.from_numpy(self._ends[rows] - 1),
            torch.from_numpy(self._places(rows[:, None], positions).reshape(-1)),
            _mask(steps < length[:, None])[:, None, None],
        )

    def _chunk(self, row: int, first: int, length: int, window: int | None) -> _Chunk:
        count, computed, end = int(self._counts[row]), int(self._computed[row]), int(self._ends[row])
        seen = np.arange(first, first + length)
        places = torch.from_numpy(self._places(np.full(length, row), seen))
        asking = np.arange(computed, computed + count)[:, None]
        mask = None
        if window is not None and length > window:
            mask = _mask((seen <= asking) & (seen > asking - window))
        elif computed:
            mask = _mask(seen <= asking)
        return _Chunk(slice(end - count, end), places, mask)

    def _places(self, rows: Integers, positions: Integers) -> Integers:
        return self._table[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def kept(module: Any, scale: str, given: Tensor) -> Tensor:
    """Keys or values `[heads, tokens, dim]` as the pool holds them."""
    scheme = getattr(module, "cache_scheme", None)
    if scheme is None:
        return given
    made = compress(given, getattr(module, scale, None), scheme)
    return _as(made, torch.int8) if made.dtype.itemsize == 1 else made


def read(module: Any, scale: str, held: Tensor) -> Tensor:
    """The floats that some of the pool stands for."""
    scheme = getattr(module, "cache_scheme", None)
    return held if scheme is None else decompress(_as(held, scheme.dtype), getattr(module, scale, None))


def _as(held: Tensor, dtype: torch.dtype) -> Tensor:
    # Only where it must: TorchScript cannot record a view of another dtype.
    return held if held.dtype is dtype else held.view(dtype)


def _mask(visible: npt.NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32("-inf")))


def _paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: Attention,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `query`, `key` and `value` are `[1, heads, tokens, dim]`."""
    if attention_mask is not None:
        options["attention_mask"] = attention_mask
    return paged.attend(module, query[0], key[0], value[0], options)[None], None


AttentionInterface.register(PAGED, _paged_attention)
