"""Structured pruning: channels, heads and width that are really taken out."""

from optkit_prune.structured.transform import Structured

__all__ = ["Structured"]
