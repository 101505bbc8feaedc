"""How this process's heap gets memory from the system."""

from __future__ import annotations

import ctypes
import platform

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_MAPPED = 256 << 20  # bytes from which a block is still a mapping of its own, so that whole models leave no holes


def keep_freed_memory() -> bool:
    """Let the heap keep what this process frees, for the rest of its life, where the C library is glibc.

    By default glibc maps each large block anew and gives it back when it is freed, so that the tensors of each forward
    or backward pass are faulted in page by page, which takes up to a quarter of the time that training a small model
    takes on a CPU. For a process that computes and ends: one that serves would keep memory that others could use.

    Returns:
        whether the heap took the settings (mallopt(3)).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = [mallopt(_MMAP_THRESHOLD, _MAPPED), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, 64 << 20)]
    return taken == [1, 1, 1]
