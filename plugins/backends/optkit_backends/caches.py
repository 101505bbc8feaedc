"""Formats of keys and values that kernels written here read as they lie in a cache's blocks."""

from __future__ import annotations

__all__ = ["BLOCKS"]

BLOCKS = {
    "kv:int8-head": "int8 blocks, dequantized",
    "kv:int8-tensor": "int8 blocks, dequantized",
    "kv:bfloat16": "bfloat16 blocks, widened",
}
"""By tag, what a reader of a plan is told; what happens to them happens when they are read."""
