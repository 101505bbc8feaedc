"""The quantized KV cache of a model as compressed-tensors stores it: `kv_cache_scheme`, and scales beside the weights.

Format: `QuantizationConfig.kv_cache_scheme` of compressed-tensors 0.20. The tensors `*.k_scale` and `*.v_scale` of each
attention layer are `[kv_heads, 1, 1]`, or `[1]`. transformers and vLLM know them. It has no words for a cache of
bfloat16: there `config.json` has the entry `optkit_kv_cache`, which others ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from optkit.schemes import BFLOAT16_CACHE, CACHE_ENTRY, CacheScheme

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["cache_args", "cache_scheme_of", "describe_cache", "entry_tags", "restore_cache", "restore_entry"]

_GRANULARITIES: dict[str, Literal["head", "tensor"]] = {"attn_head": "head", "tensor": "tensor"}


def cache_args(module: nn.Module) -> Any:
    """The `kv_cache_scheme` of a model as compressed-tensors' `QuantizationArgs`; None if its cache has no scales."""
    from compressed_tensors.quantization import QuantizationArgs

    from optkit.kv import cache_scheme

    scheme = cache_scheme(module)
    if scheme is None or scheme.granularity is None:
        return None
    strategy = next(name for name, granularity in _GRANULARITIES.items() if granularity == scheme.granularity)
    return QuantizationArgs(num_bits=8, type=scheme.type, strategy=strategy, symmetric=True)


def cache_scheme_of(args: Mapping[str, Any]) -> CacheScheme:
    """The scheme that a `kv_cache_scheme` describes.

    Raises:
        ValueError: one that optkit has no cache for.
    """
    bits, kind, strategy = (args.get(key) for key in ("num_bits", "type", "strategy"))
    granularity = _GRANULARITIES.get(str(strategy))
    if granularity is None or kind not in ("int", "float") or bits != 8:
        raise ValueError(f"kv_cache_scheme has {bits} bits, {kind}, {strategy}, optkit has 8 bits, by head or tensor")
    if args.get("dynamic") or not args.get("symmetric"):
        raise ValueError("kv_cache_scheme is dynamic or asymmetric, optkit reads static symmetric ones")
    return CacheScheme(kind, granularity)


def restore_cache(module: nn.Module, state: Mapping[str, Tensor], args: Mapping[str, Any]) -> None:
    """Give every attention layer the cache that it was saved with.

    Args:
        module: changed in place.
        state: tensors by name, floats in float32.
        args: `kv_cache_scheme`.

    Raises:
        ValueError: no such cache, or scales of the wrong shape.
        KeyError: a layer has no scales.
    """
    from optkit.kv import attention_layers, round_cache

    scheme = cache_scheme_of(args)
    for path, layer in attention_layers(module).items():
        round_cache(layer, scheme, state[f"{path}.k_scale"], state[f"{path}.v_scale"])


def describe_cache(module: Any) -> None:
    """Make the configuration of a transformers model say that its cache has no scales, or that it has, in place."""
    from optkit.kv import cache_scheme

    if hasattr(module.config, CACHE_ENTRY):
        delattr(module.config, CACHE_ENTRY)
    if cache_scheme(module) == BFLOAT16_CACHE:
        setattr(module.config, CACHE_ENTRY, BFLOAT16_CACHE.type)


def entry_tags(config: Mapping[str, Any]) -> frozenset[str]:
    """The `kv:*` tag of a `config.json` with such an entry, whatever it says; what no backend has is refused."""
    return frozenset({f"kv:{config[CACHE_ENTRY]}"}) if CACHE_ENTRY in config else frozenset()


def restore_entry(module: Any) -> None:
    """Give every attention layer the cache that such an entry of its configuration names.

    Raises:
        ValueError: it names another than bfloat16, or the model has a cache with scales already.
    """
    from optkit.kv import attention_layers, cache_scheme, round_cache

    entry = getattr(module.config, CACHE_ENTRY, None)
    if entry is None:
        return
    if entry != BFLOAT16_CACHE.type or cache_scheme(module) is not None:
        raise ValueError(f"{CACHE_ENTRY} is {entry!r}, optkit has {BFLOAT16_CACHE.type}, in place of kv_cache_scheme")
    for layer in attention_layers(module).values():
        round_cache(layer, BFLOAT16_CACHE)
