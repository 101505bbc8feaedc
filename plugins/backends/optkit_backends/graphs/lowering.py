"""What becomes of weight formats in graphs that are compiled in float32."""

from __future__ import annotations

import re
from collections.abc import Mapping

from optkit.backends import Lowering
from optkit_backends.caches import BLOCKS
from optkit_backends.tasks import other_task

__all__ = ["graph_lowering"]

# Numbers next to a half round to the other neighbour where sums go in another order, and each layer multiplies what the
# ones before tipped. MiniLM shows 0.07 in padded batches; twice that.
_ROUNDED_TOLERANCE = 0.15

ACTIVATIONS = re.compile(r"activations:(int8|fp8)-(dynamic|static)(-asym)?")


def graph_lowering(tags: frozenset[str], linear: str, dequantized: str) -> Mapping[str, Lowering]:
    """For each tag of a format the kernel that will run it or why none can.

    Args:
        tags: of a model.
        linear: the kernel of linear layers.
        dequantized: when integer weights are, and what that costs.
    """
    lowered = {
        tag: _weights(tag, linear, dequantized)
        for tag in sorted(tags | {"weights:float"})
        if tag.startswith("weights:")
    }
    lowered |= {tag: _activations(tag) for tag in sorted(tags) if tag.startswith("activations:")}
    lowered |= {tag: _cache(tag) for tag in sorted(tags) if tag.startswith("kv:")}
    return lowered | other_task(tags)


def _weights(tag: str, linear: str, dequantized: str) -> Lowering:
    if tag == "weights:float":
        return Lowering(linear, native=True, tolerance=1e-5)
    if tag.startswith("weights:bnb-"):
        return _impossible("bitsandbytes' operators cannot be traced; use the torch backend")
    return Lowering(linear, native=False, tolerance=1e-5, reason=dequantized)


def _activations(tag: str) -> Lowering:
    match = ACTIVATIONS.fullmatch(tag)
    if match is None:
        return _impossible("it rounds activations to int8 or fp8, by token or by calibration")
    reason = "rounded in float32: quality is that of the artifact, speed is not"
    kernel = f"inputs rounded to {match[1]} in float32"
    return Lowering(kernel, native=False, tolerance=_ROUNDED_TOLERANCE, reason=reason)


def _cache(tag: str) -> Lowering:
    if tag not in BLOCKS:
        return _impossible(
            "it keeps keys and values as float32, bfloat16 or int8; how fp8 is read as bytes cannot be traced"
        )
    # Likewise: SmolLM2-135M shows 0.006.
    return Lowering(f"paged attention over {BLOCKS[tag]} when read", native=True, tolerance=0.02)


def _impossible(reason: str) -> Lowering:
    return Lowering("", native=False, reason=reason)
