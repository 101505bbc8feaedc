"""A decoder on the native kernels: one call into them for each step."""

from __future__ import annotations

import ctypes
from array import array
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from optkit.errors import MachineError
from optkit.kv import stop_rounding
from optkit.steps import KernelTime, Limits, StepPlan, StepResult
from optkit.weights import load_folder
from optkit_backends.torch.native.building import best_instructions, library
from optkit_backends.torch.native.decoder import Decoder
from optkit_backends.torch.native.layout import Instructions, Step
from optkit_backends.torch.native.times import kernel_times, room
from optkit_backends.torch.pool import Pool, PooledSession
from optkit_backends.torch.probe import page

__all__ = ["NativeSession"]

_OUTSIDE = 2  # what `optkit_step` says of numbers that would make it read or write somewhere else


class NativeSession(PooledSession):
    """Runs the model of a weights folder; see `optkit.backends.TokenSession`.

    A row's logits depend on nothing but its own tokens and blocks, to the last bit: every sum goes in one order,
    however many rows a step has and whichever thread takes them.

    Args:
        weights: the folder.
        limits: what it must hold.
        threads: that share a step.
        instructions: of the kernels; by default the best that this processor has.

    Raises:
        MachineError: the processor has no such instructions, or there is no memory.
    """

    def __init__(
        self, weights: Path, limits: Limits, *, threads: int, instructions: Instructions | None = None
    ) -> None:
        module: Any = load_folder(weights).module
        stop_rounding(module)
        paged = page(module, str(weights))
        paged.check(limits.max_length, weights)
        self._library, best = library(), best_instructions()
        self._instructions = best if instructions is None else instructions
        if self._instructions > best:
            raise MachineError(f"these kernels need a processor with {self._instructions.title}", found=best.title)
        self._decoder: Any = Decoder(module, paged.windows, limits.max_length, str(weights))
        self._pool = Pool.within(limits, self._decoder.shapes)
        self._decoder.use(self._pool)
        self._handle = self._library.optkit_open(ctypes.byref(self._decoder.model), threads, self._instructions)
        if self._handle is None:
            raise MachineError("no threads, or no memory, for the native kernels", where=str(weights))
        self.caps = self._pool.caps(limits, self._decoder.model.vocabulary)

    def execute(self, plan: StepPlan) -> StepResult:
        return self._run(plan, None)

    def _run(self, plan: StepPlan, seconds: Any) -> StepResult:
        rows = plan.rows
        tokens = [token for row in rows for token in row.tokens]
        width = max(len(row.blocks) for row in rows)
        starts, ends = [0], [0]
        table: list[int] = []
        kept: list[int] = []
        for row in rows:
            wanted = row.wanted
            kept += range(starts[-1] + wanted.start, starts[-1] + wanted.stop)
            starts.append(starts[-1] + len(row.tokens))
            ends.append(len(kept))
            table += (*row.blocks, *(0,) * (width - len(row.blocks)))
        parts = (tokens, starts, [row.computed for row in rows], table, kept)
        # One array, and none of numpy: what a call costs counts where a step is of one token, after which no code is in
        # the caches any more.
        numbers = array("i", chain.from_iterable(parts))
        logits = np.empty((len(kept), self.caps.vocab_size), np.float32)
        places = accumulate((4 * len(part) for part in parts[:-1]), initial=numbers.buffer_info()[0])
        step = Step(*places, logits.ctypes.data, seconds, len(tokens), len(rows), width, len(kept))
        error = self._library.optkit_step(self._handle, ctypes.byref(step))
        if error == _OUTSIDE:
            raise IndexError("a step with tokens that the vocabulary, or blocks that the cache, does not have")
        if error:
            raise MachineError("no memory for a step", found=f"{len(tokens)} tokens")
        return StepResult(tuple(logits[a:b] for a, b in pairwise(ends)))

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        self.execute(plan)  # warm up; to run a row again writes the same keys and values
        seconds = room(self._decoder.model)
        self._run(plan, seconds)
        return kernel_times(self._decoder.model, self._instructions, list(seconds), plan)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.optkit_close(handle)
        self._pool, self._decoder = Pool((), 0), None
