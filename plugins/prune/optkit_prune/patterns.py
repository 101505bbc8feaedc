"""Tags that more than one pruner cannot work on."""

from __future__ import annotations

__all__ = ["QUANTIZED"]

QUANTIZED = frozenset({"weights:[!f]*", "weights:f[!l]*", "activations:*", "kv:*"})
"""Patterns of quantized weights (every `weights:*` but `weights:float`), activations and KV caches: their scales are
those of the weights as they were."""
