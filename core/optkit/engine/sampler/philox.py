"""Random numbers that depend on a key and a counter alone: Philox4x32-10 of Random123 (Salmon et al., SC'11)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["philox", "uniform"]

Words = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_FACTORS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Four random words for each counter. All arrays `[rows]` uint64 that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # 32-bit factors: their product fits 64 bits.
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1, c2, c3 = (second >> _HALF) ^ c1 ^ k0, second & _LOW, (first >> _HALF) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniform(seeds: Words, samples: Words, positions: Words) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each row, from 53 bits.

    Args:
        seeds: `[rows]`, any 64-bit number.
        samples: `[rows]`, below 2**32.
        positions: `[rows]`.
    """
    counter = positions & _LOW, positions >> _HALF, samples, np.zeros_like(samples)
    high, low, _, _ = philox(counter, (seeds & _LOW, seeds >> _HALF))
    return ((high << _HALF | low) >> np.uint64(11)).astype(np.float64) * 2.0**-53
