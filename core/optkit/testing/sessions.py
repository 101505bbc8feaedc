"""A causal language model without weights, for testing batchers and whatever drives sessions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from optkit.backends import TokenSession
from optkit.steps import Caps, KernelTime, Row, StepPlan, StepResult

__all__ = ["ScriptedSession"]

_EMPTY = -1


class ScriptedSession(TokenSession):
    """A model whose next token depends on every token before it, read back from the blocks that the step names.

    So a block that is lost, mixed up, overwritten or shared by mistake changes the output, or is caught at once: it
    asserts that a row's computed tokens are in its blocks.

    Args:
        blocks: in its KV cache.
        block_size: tokens of one block.
        max_length: tokens of one sequence; all blocks together by default.
        max_batch_size: rows of one step.
        vocab_size: token ids.
        mixed: whether rows of one and of many new tokens may share a step; it asserts that they do not otherwise.
        fault: called with each row before the step; what it returns is raised.
        poison: called with each row; True makes its logits NaN.
    """

    def __init__(
        self,
        blocks: int = 16,
        block_size: int = 4,
        *,
        max_length: int | None = None,
        max_batch_size: int = 8,
        vocab_size: int = 17,
        mixed: bool = True,
        fault: Callable[[Row], Exception | None] = lambda _: None,
        poison: Callable[[Row], bool] = lambda _: False,
    ) -> None:
        length = max_length or blocks * block_size
        kv: Literal["paged", "slot"] = "slot" if block_size >= length else "paged"
        self.caps = Caps(kv, block_size, blocks, max_batch_size, mixed, vocab_size, length)
        self.steps = 0
        """Steps that were tried."""
        self._fault, self._poison = fault, poison
        self._tokens = np.full((blocks, block_size), _EMPTY, np.int64)

    @classmethod
    def slots(cls, slots: int = 3, length: int = 40, **options: int) -> ScriptedSession:
        """One with a slot for each sequence."""
        return cls(slots, length, max_length=length, max_batch_size=slots, **options)  # type: ignore[arg-type]

    def execute(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        assert 0 < len(plan.rows) <= self.caps.max_batch_size, "too many rows, or none"
        assert len({row.sequence for row in plan.rows}) == len(plan.rows), "two rows of one sequence"
        assert self.caps.mixed or len({len(row.tokens) > 1 for row in plan.rows}) == 1, "a mixed step"
        for row in plan.rows:
            error = self._fault(row)
            if error is not None:
                raise error
        for row in plan.rows:
            self._write(row)
        return StepResult(tuple(self._logits(row) for row in plan.rows))

    def _write(self, row: Row) -> None:
        end = row.computed + len(row.tokens)
        assert row.tokens, "a row without tokens"
        assert end <= min(self.caps.max_length, len(row.blocks) * self.caps.block_size), "a row beyond its blocks"
        kept = self._tokens[list(row.blocks)].ravel()
        assert (kept[: row.computed] != _EMPTY).all(), "computed tokens are not in the KV cache"
        for place, token in enumerate(row.tokens, row.computed):
            self._tokens[row.blocks[place // self.caps.block_size], place % self.caps.block_size] = token

    def _logits(self, row: Row) -> npt.NDArray[np.float32]:
        kept = self._tokens[list(row.blocks)].ravel()
        logits = np.empty((len(row.wanted), self.caps.vocab_size), np.float32)
        for index, place in enumerate(row.wanted):
            seed = zlib.crc32(kept[: row.computed + place + 1].tobytes())
            logits[index] = np.random.default_rng(seed).normal(scale=3, size=self.caps.vocab_size)
        if self._poison(row):
            logits[:] = np.nan
        return logits

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.generic]:
        return self._tokens[list(blocks)]

    def write_blocks(self, blocks: Sequence[int], contents: npt.NDArray[np.generic]) -> None:
        self._tokens[list(blocks)] = contents

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        self.execute(plan)
        return [KernelTime("script", "python", 0.0)]

    def close(self) -> None:
        self._tokens[:] = _EMPTY
