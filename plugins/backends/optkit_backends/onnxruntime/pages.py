"""Weights in huge pages.

A step of decoding reads every weight once. With pages of 4 KiB a good part of that time goes into looking up addresses,
in virtual machines most of all. Document: madvise(2), MADV_COLLAPSE, Linux 6.1.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SETTING", "huge_pages"]

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
MAPS = Path("/proc/self/maps")
MADV_COLLAPSE = 25


@contextmanager
def huge_pages() -> Iterator[None]:
    """Asks Linux to move what the block allocates, and keeps, into huge pages.

    Nothing is asked for where they are switched off, or on another system. Where the kernel has none to give, memory
    stays as it is: numbers are the same, and steps take longer.
    """
    before = _mappings()
    yield
    if not before:
        return
    size = int(SIZE_FILE.read_text())
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in _mappings() - before:
        first, last = -(-start // size) * size, end // size * size
        if first < last:
            madvise(first, last - first, MADV_COLLAPSE)


def _mappings() -> set[tuple[int, int]]:
    """Where this process's own memory lies; none where huge pages are not to be had."""
    try:
        if "[never]" in SETTING.read_text():
            return set()
        lines = [line.split() for line in MAPS.read_text().splitlines()]
    except OSError:
        return set()
    anonymous = (line[0].split("-") for line in lines if line[1] == "rw-p" and line[5:] in ([], ["[heap]"]))
    return {(int(start, 16), int(end, 16)) for start, end in anonymous}
