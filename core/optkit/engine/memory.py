"""The KV cache of one session: which sequence has which blocks, shared prefixes, copies on write, and swapping."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from optkit import hardware
from optkit.backends import TokenSession
from optkit.batching import RequestView, Start
from optkit.engine.blocks import BlockPool, extend_keys
from optkit.engine.sequence import Group, Saved, Sequence
from optkit.steps import Caps

__all__ = ["Memory"]


class Memory:
    """Gives blocks to sequences. Implements `optkit.batching.MemoryView` for the batcher.

    Args:
        session: whose blocks these are.
        shares_prefixes: keep the full blocks of ended sequences for requests that begin alike.
    """

    def __init__(self, session: TokenSession, *, shares_prefixes: bool) -> None:
        self.caps: Caps = session.caps
        self.pool = BlockPool(session.caps.blocks)
        self._session = session
        self._block_size = session.caps.block_size
        self._shares_prefixes = shares_prefixes
        self._block_bytes = 0  # as `read_blocks` gives them, known from the first swap on

    # --- asked by the batcher

    @property
    def free(self) -> int:
        return self.pool.free

    def start(self, request: RequestView) -> Start:
        group = cast("Group", request)
        if group.saved is not None:
            return Start(0, len(group.saved.used))
        hits = self._hits(group)
        return Start(len(hits) * self._block_size, sum(not self.pool.owners(block) for block in hits))

    def needed(self, request: RequestView, tokens: Iterable[int], cached: int = 0) -> int:
        group, size, new = cast("Group", request), self._block_size, 0
        if group.running and len(group.live) == 1:  # nearly always: nothing is saved, shared or cached
            own, (count,) = group.live[0], tokens
            return max(0, -(-(own.computed + count) // size) - len(own.blocks))
        for sequence, count in zip(group.sequences, tokens, strict=True):
            there = len(sequence.blocks) if group.saved is None else len(group.saved.places[sequence.id])
            new += max(0, -(-(sequence.computed + cached + count) // size) - max(there, cached // size))
        # Samples still share the last block of their prompt: all but one of its owners get a copy to write to.
        return new if len(group.live) == 1 else new + self._copies(group)

    def held(self, request: RequestView) -> int:
        group = cast("Group", request)
        return len(group.live[0].blocks) if len(group.live) == 1 else len(group.blocks())

    def released(self, requests: Collection[RequestView]) -> int:
        own: dict[int, int] = {}
        for group in requests:
            for sequence in cast("Group", group).live:
                for block in sequence.blocks:
                    own[block] = own.get(block, 0) + 1
        return sum(self.pool.owners(block) == count for block, count in own.items())

    # --- done by the engine

    def begin(self, group: Group) -> None:
        """Give a waiting group what `start` said: its swapped blocks, or what the prefix cache has of it."""
        if group.saved is not None:
            self._restore(group, group.saved)
            return
        leader = group.live[0]
        hits = self._hits(group)
        self.pool.share(hits)
        leader.blocks, leader.computed = tuple(hits), len(hits) * self._block_size

    def grow(self, sequence: Sequence, tokens: int) -> None:
        """Make room for `tokens` more, and for writing to them: a block that others share is copied first.

        Raises:
            MemoryError: too few free blocks; the sequence keeps what it has.
        """
        missing = -(-(sequence.computed + tokens) // self._block_size) - len(sequence.blocks)
        if missing > 0:
            if missing > self.pool.free:
                raise MemoryError(f"{missing} blocks are needed and {self.pool.free} are free")
            sequence.blocks += tuple(self.pool.take() for _ in range(missing))
        written = sequence.computed // self._block_size
        before = sequence.blocks[written]
        if self.pool.owners(before) > 1:
            own = self.pool.take()
            with self._given_back((own,)):
                self._session.copy_blocks([(before, own)])
            self.pool.release((before,))
            sequence.blocks = (*sequence.blocks[:written], own, *sequence.blocks[written + 1 :])

    def trim(self, sequence: Sequence) -> None:
        """Take back blocks that only hold padding."""
        kept = -(-sequence.computed // self._block_size)
        self.pool.release(sequence.blocks[kept:])
        sequence.blocks = sequence.blocks[:kept]

    def advance(self, sequence: Sequence, computed: int) -> None:
        """Set how much of a sequence is computed; blocks that this fills can be found by others from now on."""
        size, filled = self._block_size, sequence.computed // self._block_size
        sequence.computed = computed
        if self._shares_prefixes and computed // size > filled:
            extend_keys(sequence.keys, sequence.tokens[: computed // size * size], size, sequence.group.request.salt)
            for index in range(filled, computed // size):
                self.pool.register(sequence.blocks[index], sequence.keys[index])

    def fork(self, group: Group) -> None:
        """Let every sample have the computed prompt of the first one."""
        leader, *others = group.live
        for other in others:
            self.pool.share(leader.blocks)
            other.blocks, other.computed, other.keys = leader.blocks, leader.computed, list(leader.keys)
        group.forked = True

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks of a sequence; what it had computed is forgotten."""
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.draft = (), 0, ()

    def evict(self, group: Group) -> None:
        """Take back every block of every sample."""
        for sequence in group.live:
            self.release(sequence)
        group.forked = group.request.params.samples == 1

    def swap_out(self, group: Group) -> bool:
        """Copy every block of every sample to host memory and take it back; False, undone, when that has no room.

        Half of the memory that is free at the moment may go into it.
        """
        blocks = group.blocks()
        if blocks and self._block_bytes == 0:
            self._block_bytes = self._session.read_blocks(blocks[:1]).nbytes
        if len(blocks) * self._block_bytes > hardware.memory().available // 2:
            return False
        places = {block: place for place, block in enumerate(blocks)}
        saved = {one.id: tuple(places[block] for block in one.blocks) for one in group.live}
        contents = self._session.read_blocks(blocks)
        for sequence in group.live:
            computed = sequence.computed
            self.release(sequence)
            sequence.computed = computed
        group.saved = Saved(contents, saved)
        return True

    def check(self, alive: Iterable[Group], ended: Iterable[Sequence]) -> None:
        """Raise AssertionError if blocks and owners do not add up; see `BlockPool.check`."""
        owners = [*(sequence for group in alive for sequence in group.live), *ended]
        self.pool.check(block for sequence in owners for block in sequence.blocks)

    def _hits(self, group: Group) -> list[int]:
        if not self._shares_prefixes or group.scored:
            return []
        leader, size = group.live[0], self._block_size
        extend_keys(leader.keys, leader.tokens, size, group.request.salt)
        # The last token is always computed: its logits are what comes next.
        return self.pool.find(leader.keys[: (leader.target - 1) // size])

    def _restore(self, group: Group, saved: Saved) -> None:
        blocks = {place: self.pool.take() for place in saved.used}
        with self._given_back(tuple(blocks.values())):
            self._session.write_blocks(list(blocks.values()), saved.contents[saved.used])
        seen: set[int] = set()
        for sequence in group.live:
            sequence.blocks = tuple(blocks[place] for place in saved.places[sequence.id])
            self.pool.share(block for block in sequence.blocks if block in seen)
            seen.update(sequence.blocks)
        group.saved = None

    @contextmanager
    def _given_back(self, blocks: tuple[int, ...]) -> Iterator[None]:
        """Release blocks that were just taken, when the session cannot fill them."""
        try:
            yield
        except BaseException:
            self.pool.release(blocks)
            raise

    def _copies(self, group: Group) -> int:
        """Blocks that samples write to next and share with each other, less one owner each, who keeps the original."""
        written: list[int] = []
        for sequence in group.sequences:
            places = sequence.blocks if group.saved is None else group.saved.places[sequence.id]
            written += places[sequence.computed // self._block_size :][:1]
        return len(written) - len(set(written))
