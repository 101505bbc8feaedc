"""One step of a causal language model as a function of tensors: a `Launch` and the KV cache in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from optkit.kv import stop_rounding
from optkit.steps import Row
from optkit_backends.graphs.launch import Launch, cache_of
from optkit_backends.graphs.timing import Product, products_of
from optkit_backends.positional import shallow_copy
from optkit_backends.torch.attention import kept, read
from optkit_backends.torch.dense import make_dense
from optkit_backends.torch.pool import BLOCK_SIZE, Pool
from optkit_backends.torch.probe import Paged, page

__all__ = ["OTHER_SIZES", "DecoderGraph"]

EXAMPLE = (2, 3)
OTHER_SIZES = ((1, 0), (0, 7), (3, 5), (1, 2))
"""Rows of one token and tokens of one more row: all that a compiler of graphs could take for a constant or for 1."""
LAUNCHED = 9  # tensors of a launch before its masks


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """A causal language model as a compiler of graphs takes it."""

    name: str
    """Of its class, for errors."""
    step: nn.Module
    """In evaluation mode; called with the tensors of a launch, and keys and values of each layer in turn, it gives
    `([logits, vocabulary] float32,)` and writes new keys and values into those that it was given."""
    paged: Paged
    windows: list[int | None]
    """The different windows of its layers, in the order of a launch's masks."""
    vocab_size: int
    pool: Pool
    """Of 8 blocks, for examples. Each holds the keys and values of a sequence of its own."""

    @classmethod
    def of(cls, module: Any) -> DecoderGraph:
        """A module of transformers, which stays as it is. Quantized layers become float layers.

        Args:
            module: a causal language model.

        Raises:
            RecipeError: its attention is none that can be paged.
        """
        name, module = type(module).__name__, shallow_copy(module)
        make_dense(module)
        stop_rounding(module)
        paged = page(module, name)
        windows = list(dict.fromkeys(paged.windows))
        step = _Step(module, paged, windows).eval()
        made = cls(name, step, paged, windows, module.config.vocab_size, Pool(paged.layers, blocks=8))
        made._fill()
        return made

    def inputs(self, sizes: tuple[int, int] = EXAMPLE) -> tuple[Tensor, ...]:
        """Of a step with so many rows of one token, and one row of so many tokens, if any. All go on with sequences
        whose keys and values the model has computed: after random ones, small differences would grow."""
        single, several = sizes
        rows = [self._row(i, 2 * i + 1, 1) for i in range(single)]
        if several:
            rows.append(self._row(single, BLOCK_SIZE - 3, several))
        return (*Launch.of(rows, self.windows).tensors, *(tensor.clone() for tensor in cache_of(self.pool)))

    @torch.no_grad()
    def _fill(self) -> None:
        for block in range(self.pool.blocks):
            launch = Launch.of([self._row(block, 0, BLOCK_SIZE)], self.windows)
            self.step(*launch.tensors, *cache_of(self.pool))

    def _row(self, block: int, computed: int, count: int) -> Row:
        """So many tokens of the sequence that begins in a block, and may go on into the next one."""
        places = range(computed, computed + count)
        tokens = tuple((997 * (BLOCK_SIZE * block + place) + 31) % self.vocab_size for place in places)
        blocks = (block, block + 1)[: 1 + places[-1] // BLOCK_SIZE]
        return Row(block, tokens, computed, blocks, "all" if count > 1 else "last")

    def dynamic(self) -> list[list[int]]:
        """For each input the axes whose size may change."""
        found = [
            [axis for axis in range(one.dim()) if one.shape[axis] != other.shape[axis]]
            for one, other in zip(self.inputs(), self.inputs(OTHER_SIZES[2]), strict=True)
        ]
        held = 2 * len(self.paged.layers)
        return [*found[:-held], *([1] for _ in range(held))]

    def facts(self) -> dict[str, Any]:
        """What `optkit_backends.graphs.facts.DecoderFacts` wants to know of it."""
        layers = [(one.heads, one.key_dim, one.value_dim, _name(one.dtype)) for one in self.paged.layers]
        return {
            "layers": layers,
            "windows": self.windows,
            "products": self.products(),
            "vocab_size": self.vocab_size,
            "longest": self.paged.longest,
            "torch": torch.__version__,
        }

    def products(self) -> list[Product]:
        """Its linear layers, in the order in which they run."""
        return products_of(self.step.get_submodule("module"), lambda: self.step(*self.inputs()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Step(nn.Module):
    """One step of a causal language model over a paged KV cache, as a function of tensors alone."""

    def __init__(self, module: nn.Module, paged: Paged, windows: Sequence[int | None]) -> None:
        super().__init__()
        self.module = module
        self._paged, self._windows = paged, list(windows)

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        tokens, positions, written, wanted = given[:4]
        masks, cache = given[LAUNCHED:][: 2 * len(self._windows)], given[LAUNCHED + 2 * len(self._windows) :]
        logits = self.module(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=wanted,
            paged=_Attention(self._paged, self._windows, written, given[4:LAUNCHED], masks, cache),
        ).logits
        return (logits[0].float(),)


class _Attention:
    """Attention over a `Launch`: see `optkit_backends.torch.attention.Attention`."""

    def __init__(
        self,
        paged: Paged,
        windows: Sequence[int | None],
        written: Tensor,
        parts: Sequence[Tensor],
        masks: Sequence[Tensor],
        cache: Sequence[Tensor],
    ) -> None:
        self._paged, self._windows, self._written = paged, windows, written
        self._single, self._decoding, self._several, self._chunk, self._order = parts
        self._masks, self._cache = masks, cache

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        layer: Any = module.layer_idx
        shape, scale = self._paged.layers[layer], options.get("scaling")
        place = self._windows.index(self._paged.windows[layer])
        keys, values = self._cache[2 * layer], self._cache[2 * layer + 1]
        keys.index_copy_(1, self._written, kept(module, "k_scale", key))
        values.index_copy_(1, self._written, kept(module, "v_scale", value))
        shared, group = shape.heads, int(query.shape[0]) // shape.heads
        query = query.unflatten(0, (shared, group))  # type: ignore[no-untyped-call]  # torch's own
        rows, length = self._decoding.shape[0], self._decoding.shape[1]
        seen = read(module, "k_scale", keys.index_select(1, self._decoding.reshape(-1)))
        content = read(module, "v_scale", values.index_select(1, self._decoding.reshape(-1)))
        single = scaled_dot_product_attention(
            query.index_select(2, self._single).permute(2, 0, 1, 3),
            seen.view(shared, rows, length, shape.key_dim).transpose(0, 1),
            content.view(shared, rows, length, shape.value_dim).transpose(0, 1),
            attn_mask=self._masks[2 * place],
            scale=scale,
        )
        seen = read(module, "k_scale", keys.index_select(1, self._chunk))
        content = read(module, "v_scale", values.index_select(1, self._chunk))
        several = scaled_dot_product_attention(
            query.index_select(2, self._several),
            seen[:, None].expand(-1, group, -1, -1),
            content[:, None].expand(-1, group, -1, -1),
            attn_mask=self._masks[2 * place + 1],
            scale=scale,
        )
        found = torch.cat([single, several.permute(2, 0, 1, 3)]).index_select(0, self._order)
        return found.flatten(1, 2)
