"""Keys and values as a KV cache of 8 or 16 bits keeps them, and models that compute with such a cache.

Vocabulary and rounding of 8 bits are those of compressed-tensors' `kv_cache_scheme`: a key `k` is kept as
`round(k / scale)`, clamped to `[-128, 127]`, or as the E4M3 number next to `k / scale`, and read back as that times
`scale`. Without a scale it is kept as the bfloat16 number next to `k`. Keys are rounded as the cache gets them, after
rotary angles.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from optkit.schemes import FP8_MAX, CacheScheme

__all__ = [
    "attention_layers",
    "cache_scheme",
    "compress",
    "decompress",
    "round_cache",
    "rounding_layers",
    "stop_rounding",
    "watch_cache",
]


def compress(values: Tensor, scale: Tensor | None, scheme: CacheScheme) -> Tensor:
    """Keys or values as the cache keeps them.

    Args:
        values: `[..., heads, tokens, dim]` float.
        scale: `[heads, 1, 1]` float, or `[1]` for all heads; None of a scheme without.
        scheme: what to round to.

    Returns:
        The same shape, in the scheme's dtype.
    """
    if scale is None:
        return values.to(scheme.dtype)
    divided = values / scale
    if scheme.type == "float":
        return divided.clamp(-FP8_MAX, FP8_MAX).to(scheme.dtype)
    return divided.round().clamp(-128, 127).to(scheme.dtype)


def decompress(kept: Tensor, scale: Tensor | None) -> Tensor:
    """What kept keys or values stand for, in the dtype of `scale`, float32 without one; shapes as for `compress`."""
    return kept.float() if scale is None else kept.to(scale.dtype) * scale


def attention_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of a transformers model that write a KV cache, by path, in the model's order."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if "attention" in type(layer).__name__.lower()
        and hasattr(layer, "layer_idx")
        and "past_key_values" in inspect.signature(layer.forward).parameters
    }


def watch_cache(attention: nn.Module, see: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Let `see(attention, key, value)` have what an attention layer gives its cache, and put its answer there instead.

    Keys and values are `[rows, heads, tokens, dim]`. The layer gives them even where it is called without a cache.

    Returns:
        A handle whose `remove()` ends it.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": _Between(module, see, kwargs.get("past_key_values"))}

    return attention.register_forward_pre_hook(hook, with_kwargs=True)


class _Between:
    """Stands between an attention layer and its cache."""

    def __init__(self, attention: nn.Module, see: Callable[..., tuple[Tensor, Tensor]], cache: Any) -> None:
        self._attention, self._see, self._cache = attention, see, cache

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        key, value = self._see(self._attention, key, value)
        return (key, value) if self._cache is None else self._cache.update(key, value, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def round_cache(
    attention: nn.Module, scheme: CacheScheme, key_scale: Tensor | None = None, value_scale: Tensor | None = None
) -> None:
    """Let an attention layer see its keys and values as a cache of 8 or 16 bits keeps them, from now on.

    The layer gets buffers `k_scale` and `v_scale` if there are scales, which a `weights` folder keeps.

    Args:
        attention: a layer of `attention_layers`, changed in place.
        scheme: of the cache.
        key_scale: `[heads, 1, 1]` float32, or `[1]` where all heads share it; None of a scheme without.
        value_scale: likewise.

    Raises:
        ValueError: a scale has another shape, is not positive and finite, or is none of the scheme's.
    """
    layer: Any = attention
    for name, scale in (("k_scale", key_scale), ("v_scale", value_scale)):
        if (scale is None) != (scheme.granularity is None):
            raise ValueError(f"{name} is missing, or the scheme has no scales")
        if scale is None:
            continue
        wanted = (scale.numel(), 1, 1) if scheme.granularity == "head" else (1,)
        if scale.shape != wanted or not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"{name} has the shape {tuple(scale.shape)}, or is not positive and finite")
        layer.register_buffer(name, scale)
    layer.cache_scheme, layer.cache_rounding = scheme, watch_cache(layer, _round)


def _round(attention: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    scheme = attention.cache_scheme
    key, value = (
        decompress(compress(given, scale, scheme), scale).to(given.dtype)
        for given, scale in (
            (key, getattr(attention, "k_scale", None)),
            (value, getattr(attention, "v_scale", None)),
        )
    )
    return key, value


def rounding_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every attention layer that `round_cache` changed, with its path."""
    return ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "cache_scheme"))


def cache_scheme(module: nn.Module) -> CacheScheme | None:
    """How the cache of a model is to be kept, or None: in floats."""
    return next((layer.cache_scheme for _, layer in rounding_layers(module)), None)


def stop_rounding(module: nn.Module) -> None:
    """Take the rounding back, for a runtime that does it where it keeps the cache. Schemes and scales stay."""
    for _, layer in rounding_layers(module):
        layer.cache_rounding.remove()
