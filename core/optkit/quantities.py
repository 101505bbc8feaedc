"""Quantities in words."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes: `528.3 MB`."""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def parameters(count: int) -> str:
    """What a model holds: `134.5 M parameters`."""
    return _scaled(count, (("B parameters", 1e9), ("M parameters", 1e6), ("k parameters", 1e3)), "parameters")


def _scaled(count: float, units: tuple[tuple[str, float], ...], single: str) -> str:
    """In the largest unit of which there is one."""
    for unit, worth in units:
        if count >= worth:
            return f"{count / worth:,.1f} {unit}"
    return f"{count:.0f} {single}"
