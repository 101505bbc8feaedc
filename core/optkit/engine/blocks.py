"""The pool of KV blocks. A slot is a block as long as the longest sequence, so one pool drives both kinds of cache.

A block is free, owned by one sequence or more, or kept: owned by nobody, with contents that the prefix cache can still
find, until it is needed (least recently used first).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

__all__ = ["BlockPool", "extend_keys"]


class BlockPool:
    """Who owns which block.

    Invariant: every block is in exactly one of free, kept and owned, and no key finds a free block.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        # A heap: the lowest free id comes first, so that slots in use stay close together.
        self._free = list(range(blocks))
        heapify(self._free)
        self._kept: dict[int, bytes] = {}
        self._owners: dict[int, int] = {}
        self._found: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that somebody owns."""
        return len(self._owners)

    def owners(self, block: int) -> int:
        """How many sequences own a block."""
        return self._owners.get(block, 0)

    def take(self) -> int:
        """Own a block whose contents nobody needs.

        Raises:
            MemoryError: there is none.
        """
        if self._free:
            block = heappop(self._free)
        elif self._kept:
            block = next(iter(self._kept))  # the longest unused
            del self._found[self._kept.pop(block)]
            del self._keys[block]
        else:
            raise MemoryError(f"all {self.blocks} blocks are owned")
        self._owners[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Own blocks that others own, or that are kept, once more."""
        for block in blocks:
            self._kept.pop(block, None)
            self._owners[block] = self._owners.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one ownership of each block. What has no owner left is kept if a key finds it, and free otherwise.

        Raises:
            ValueError: one of them has no owner.
        """
        # The last block of a sequence first: a prefix is worth more than what follows it.
        for block in reversed(blocks):
            owners = self._owners.get(block)
            if owners is None:
                raise ValueError(f"block {block} has no owner")
            if owners > 1:
                self._owners[block] = owners - 1
                continue
            del self._owners[block]
            key = self._keys.get(block)
            if key is None:
                heappush(self._free, block)
            else:
                self._kept[block] = key

    def register(self, block: int, key: bytes) -> None:
        """Let `key` find an owned block that is full, unless it finds another one already."""
        if key not in self._found and block not in self._keys:
            self._found[key] = block
            self._keys[block] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of keys that are all known."""
        found: list[int] = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def check(self, owned: Iterable[int]) -> None:
        """Raise AssertionError if the invariant is broken.

        Args:
            owned: the blocks of every sequence alive, one after the other; shared ones stand in it for each owner.
        """
        counts: dict[int, int] = {}
        for block in owned:
            counts[block] = counts.get(block, 0) + 1
        if counts != self._owners:
            raise AssertionError(f"owners are {self._owners}, the sequences alive hold {counts}")
        everywhere = [*self._free, *self._kept, *self._owners]
        if sorted(everywhere) != list(range(self.blocks)):
            raise AssertionError(f"free {self._free} + kept {list(self._kept)} + owned {list(self._owners)} != all")
        if {block: key for key, block in self._found.items()} != self._keys:
            raise AssertionError("keys and blocks of the prefix cache do not match")
        if not self._kept.keys() <= self._keys.keys() or self._keys.keys() & set(self._free):
            raise AssertionError("the prefix cache finds a free block, or keeps one that it cannot find")


def extend_keys(keys: list[bytes], tokens: array[int], block_size: int, salt: str) -> None:
    """Append the keys of full blocks that `keys` does not have yet.

    A block's key is SHA-256 over the key before it and its own tokens, so it stands for everything up to its end; the
    first one begins with the salt. With 256 bits nobody finds a prompt that shares a block by chance or on purpose.
    """
    for index in range(len(keys), len(tokens) // block_size):
        before = keys[index - 1] if index else salt.encode()
        part = tokens[index * block_size : (index + 1) * block_size].tobytes()
        keys.append(hashlib.sha256(len(before).to_bytes(4, "little") + before + part).digest())
