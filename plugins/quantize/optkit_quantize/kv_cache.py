"""A KV cache of 8 or 16 bits: a quarter of the memory for each token that is kept, or half."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from optkit.errors import OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.schemes import BFLOAT16_CACHE, FP8_MAX, CacheScheme
from optkit.transforms import Transform, TransformContext

if TYPE_CHECKING:
    from torch import Tensor

    from optkit.blockwise import Block

__all__ = ["KVCache"]


class KVCache(Transform):
    """Keeps keys and values in 8 bits, so that the same memory holds four times the tokens, or in 16: twice as many.

    `bfloat16` has neither scales nor data to learn from, and loses least: SmolLM2-135M's perplexity became 1.0001 times
    as high, not to be told from 1 on 2,044 tokens.
    `int8` and `fp8` have static scales. That of a head is the largest magnitude that calibration shows, over half the
    range. Keys are taken after rotary angles, as the cache has them, and each layer is calibrated behind the rounded
    ones before it. Weights stay as they are. transformers loads the folder and rounds to 8 bits likewise; bfloat16 it
    does not know, and keeps keys and values in the precision in which it computes.

    Calibration costs two passes over its data, about 2 s for each window of 512 tokens with 135 M parameters on two
    idle cores, and the memory of one block. SmolLM2-135M then loses about half a percent of perplexity, as int8 or as
    fp8. Comes last: what changes the weights of attention afterwards leaves the scales behind. For speed only with
    `backend: {torch: {kernels: native}}` and long contexts, where reading the cache takes the time; elsewhere attention
    reads floats again and nothing gets faster. Not for latent attention (DeepSeek), whose cache holds neither keys nor
    values.

    Paper: Hooper et al., KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization,
    arXiv:2401.18079 (calibrated scales; here 8 bits, by head). Format: `kv_cache_scheme` of compressed-tensors 0.20.
    """

    requires = frozenset({"task:causal-lm"})
    conflicts = frozenset({"kv:*"})

    dtype: Literal["int8", "fp8", "bfloat16"] = "int8"
    """What one key or value is kept as; `fp8` is E4M3."""
    granularity: Literal["head", "tensor"] | None = None
    """What shares a scale in a layer: the keys, or values, of one head, or of all heads. By default those of a head;
    `bfloat16` has no scales."""

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.dtype == "bfloat16" and self.granularity is not None:
            raise ValueError("granularity is about scales, and bfloat16 has none; leave it out")
        return self

    @property
    def calibration(self) -> bool:  # type: ignore[override]  # whether it learns from data is a matter of its options
        return self.dtype != "bfloat16"

    @property
    def scheme(self) -> CacheScheme:
        """How keys and values are kept."""
        if self.dtype == "bfloat16":
            return BFLOAT16_CACHE
        return CacheScheme("int" if self.dtype == "int8" else "float", self.granularity or "head")

    def provides(self) -> frozenset[str]:
        return frozenset({self.scheme.tag})

    def check(self, card: ModelCard) -> None:
        _refuse_latents(card.linears)

    def apply(self, model: Model, context: TransformContext) -> Model:
        from optkit.blockwise import walk
        from optkit.kv import attention_layers, round_cache

        _refuse_latents(name for name, _ in model.module.named_modules())
        layers = attention_layers(model.module)
        if not layers:
            name = type(model.module).__name__
            raise OptkitError("has no attention that writes a KV cache of transformers", where=name)
        if self.scheme.granularity is None:
            for layer in layers.values():
                round_cache(layer, self.scheme)
            return model.tagged(*self.provides())
        for block in walk(model.module, context, list(layers)):
            for name, scales in self._scales(block, {name: layers[name] for name in block.names}).items():
                round_cache(layers[name], self.scheme, *scales)
        for layer in layers.values():
            found: Any = layer
            if not hasattr(found, "cache_scheme"):  # a checkpoint brought its scales back
                round_cache(found, self.scheme, found.k_scale, found.v_scale)
        return model.tagged(*self.provides())

    def _scales(self, block: Block, layers: dict[str, Any]) -> dict[str, list[Tensor]]:
        """Scales of keys and values, by the path of the attention layer."""
        import torch

        from optkit.kv import watch_cache

        largest: dict[str, list[Tensor]] = {}

        def see(attention: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            name = next(name for name, layer in layers.items() if layer is attention)
            found = [given.abs().amax((0, 2, 3)) for given in (key, value)]
            seen = largest.get(name, found)
            largest[name] = [torch.maximum(before, now) for before, now in zip(seen, found, strict=True)]
            return key, value

        with ExitStack() as hooks:
            for layer in layers.values():
                hooks.callback(watch_cache(layer, see).remove)
            for _ in block.run():
                pass
        missing = [name for name in layers if name not in largest]
        if missing:
            raise OptkitError("gives no keys and values to transformers' cache", where=missing[0])
        return {name: [self._scale(range, name) for range in ranges] for name, ranges in largest.items()}

    def _scale(self, largest: Tensor, name: str) -> Tensor:
        import torch

        if not torch.isfinite(largest).all():
            raise OptkitError("a key or value is not finite on the calibration data", where=name)
        largest = largest.float()
        largest = largest.view(-1, 1, 1) if self.scheme.granularity == "head" else largest.amax().view(1)
        scale = largest / (FP8_MAX if self.dtype == "fp8" else 127.5)
        return torch.where(scale > 0, scale, torch.ones_like(scale))


def _refuse_latents(names: Iterable[str]) -> None:
    if found := next((name for name in names if name.endswith(".kv_a_proj_with_mqa")), None):
        raise RecipeError(
            "the model caches latents in place of its keys and values",
            found=found,
            remedy="leave kv_cache out",
        )
