"""The pool of KV blocks. A slot is a block whose size is the maximum length."""

from __future__ import annotations

from optkit.batching import MemoryView
from optkit.steps import Caps

__all__ = ["BlockPool"]


class BlockPool:
    """Which blocks are free and how many sequences own each of the others.

    Invariant: free blocks + owned blocks == all blocks, and no block is both.
    """

    def __init__(self, caps: Caps) -> None:
        self._caps = caps
        self._free = dict.fromkeys(range(caps.blocks))
        self._owners: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def view(self) -> MemoryView:
        """What a batcher may see; lowest ids first, so that slots in use stay close together."""
        return MemoryView(self._caps, tuple(sorted(self._free)))

    def take(self, blocks: tuple[int, ...]) -> None:
        """Own these free blocks.

        Raises:
            ValueError: one of them is not free; nothing is taken.
        """
        taken = [block for block in blocks if block not in self._free]
        if taken or len(set(blocks)) != len(blocks):
            raise ValueError(f"blocks {taken or blocks} are not free")
        for block in blocks:
            del self._free[block]
            self._owners[block] = 1

    def release(self, blocks: tuple[int, ...]) -> None:
        """Give up one ownership of each block; a block without owners is free.

        Raises:
            ValueError: one of them has no owner.
        """
        for block in blocks:
            if block not in self._owners:
                raise ValueError(f"block {block} has no owner")
            self._owners[block] -= 1
            if not self._owners[block]:
                del self._owners[block]
                self._free[block] = None

    def check(self) -> None:
        """Raise AssertionError if the invariant is broken."""
        if len(self._free) + len(self._owners) != self._caps.blocks or self._free.keys() & self._owners.keys():
            raise AssertionError(f"{len(self._free)} free + {len(self._owners)} owned != {self._caps.blocks} blocks")
