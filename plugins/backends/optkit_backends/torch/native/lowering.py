"""What the native kernels make of each format, from its tag alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from optkit.backends import Lowering
from optkit.weights import CAUSAL_LM
from optkit_backends.caches import BLOCKS

__all__ = ["ARCHITECTURES", "lowering"]

ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text"})
"""Decoders whose every detail the kernels have, as transformers calls them."""
_INTEGERS = re.compile(r"weights:int([2-8])-(channel|group)(-asym)?")
_ACTIVATIONS = re.compile(r"activations:int8-(dynamic|static)(-asym)?")


def lowering(tags: frozenset[str]) -> Mapping[str, Lowering]:
    """See `optkit.backends.Backend.lowering`."""
    lowered = {tag: _weights(tag) for tag in sorted(tags) if tag.startswith("weights:")}
    lowered |= {tag: _activations(tag, tags) for tag in sorted(tags) if tag.startswith("activations:")}
    lowered |= {tag: _cache(tag) for tag in sorted(tags) if tag.startswith("kv:")}
    if "pruned:rank" in tags:
        lowered["pruned:rank"] = _impossible("its layers have one matrix, not two of low rank")
    for tag in sorted(tags):
        if tag.startswith("arch:") and tag.removeprefix("arch:") not in ARCHITECTURES:
            lowered[tag] = _impossible(f"the native kernels know {', '.join(sorted(ARCHITECTURES))}")
        if tag.startswith("task:") and tag != CAUSAL_LM:
            lowered[tag] = _impossible("the native kernels run causal language models only; take kernels: eager")
    return lowered


def _weights(tag: str) -> Lowering:
    if tag == "weights:float":
        return Lowering("native product (float32 weights)", native=True, tolerance=1e-5)
    match = _INTEGERS.fullmatch(tag)
    if match is not None:
        stored = "int4" if int(match[1]) <= 4 else "int8"
        return Lowering(f"native product ({stored} weights)", native=True, tolerance=1e-5)
    return _impossible("the native kernels read integers of 2 to 8 bits and float32")


def _activations(tag: str, tags: frozenset[str]) -> Lowering:
    if _ACTIVATIONS.fullmatch(tag) is None:
        return _impossible("the native kernels round activations to int8 only")
    # Numbers next to a half round to the other neighbour where sums go in another order, and each layer multiplies
    # what the ones before tipped; as on eager kernels.
    tolerance = 0.15
    stored = {"int4" if int(match[1]) <= 4 else "int8" for tag in tags if (match := _INTEGERS.fullmatch(tag))}
    kernel = f"native integer product ({' and '.join(sorted(stored)) or 'integer'} weights, int8 input)"
    return Lowering(kernel, native=True, tolerance=tolerance)


def _cache(tag: str) -> Lowering:
    if tag not in BLOCKS:
        return _impossible("the native kernels keep keys and values as float32, bfloat16 or int8")
    return Lowering(f"native paged attention over {BLOCKS[tag]} when read", native=True, tolerance=0.02)


def _impossible(reason: str) -> Lowering:
    return Lowering("", native=False, reason=reason)
