"""How many KV blocks a session gets: what it can use, as far as measured free memory goes."""

from __future__ import annotations

from optkit import hardware
from optkit.errors import MachineError
from optkit.steps import Limits

__all__ = ["SHARE", "blocks_that_fit"]

SHARE = 0.8
"""Of the memory that is free once the weights are loaded; the rest is for activations, and for whoever else runs."""


def blocks_that_fit(limits: Limits, *, wanted: int, block_size: int, block_bytes: int) -> int:
    """The number of blocks to allocate.

    Args:
        limits: what the session must hold.
        wanted: blocks; exactly so many where `kv_cache_tokens` is given, and otherwise at most.
        block_size: tokens in one block.
        block_bytes: of one block, in all layers.

    Raises:
        MachineError: `kv_cache_tokens` is more than fits into free memory, or one sequence of `max_length` is.
    """
    free, least = hardware.memory().available, -(-limits.max_length // block_size)
    if limits.kv_cache_tokens is None:
        room = int(free * SHARE)
        if least * block_bytes > room:
            raise MachineError(
                f"one sequence of {limits.max_length} tokens needs {_size(least * block_bytes)} of KV cache, and"
                f" {_size(room)} are free for it",
                remedy="lower max_length, or free memory",
            )
        return min(wanted, room // block_bytes)
    if wanted < least:
        raise MachineError(
            f"one sequence takes up to {limits.max_length} tokens of KV cache",
            found=limits.kv_cache_tokens,
            remedy="raise kv_cache_tokens, or lower max_length",
        )
    if wanted * block_bytes > free:
        raise MachineError(
            f"a KV cache of {limits.kv_cache_tokens} tokens needs {_size(wanted * block_bytes)}, and {_size(free)} are"
            " free",
            remedy="lower kv_cache_tokens, or leave it out to use what is free",
        )
    return wanted


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
