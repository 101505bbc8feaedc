"""A compiled decoder as a session: its archive, and keys and values in paged blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optkit.errors import RecipeError
from optkit.steps import KernelTime, Limits, Row, StepPlan, StepResult
from optkit_backends.torch.pool import LayerShape, Pool, PooledSession
from optkit_backends.torchscript.files import DecoderFacts, load, running
from optkit_backends.torchscript.steps import Launch, launches

__all__ = ["TorchScriptSession"]

Floats = npt.NDArray[np.float32]


class TorchScriptSession(PooledSession):
    """Runs what `compile_decoder` wrote; see `optkit.backends.TokenSession`.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
        RecipeError: sequences of `limits.max_length` are longer than the archive's rotary angles hold for.
    """

    def __init__(self, directory: Path, limits: Limits) -> None:
        facts = DecoderFacts.read(directory)
        if facts.longest is not None and limits.max_length > facts.longest:
            raise RecipeError(
                f"the archive's rotary angles hold for {facts.longest} tokens",
                found=limits.max_length,
                remedy=f"set max_length to {facts.longest} or less",
            )
        self._facts, self._module = facts, load(directory, facts.torch)
        layers = [LayerShape(heads, key, value, getattr(torch, dtype)) for heads, key, value, dtype in facts.layers]
        self._pool = Pool.within(limits, layers)
        self._cache = _cache_of(self._pool)
        self.caps = self._pool.caps(limits, facts.vocab_size)

    def execute(self, plan: StepPlan) -> StepResult:
        logits: dict[int, Floats] = {}
        for rows in launches(plan.rows):
            logits |= self._run(rows)
        return StepResult(tuple(logits[row.sequence] for row in plan.rows))

    def _run(self, rows: Sequence[Row]) -> dict[int, Floats]:
        launch = Launch.of(rows, self._facts.windows)
        with running():
            (found,) = self._module(*launch.tensors, *self._cache)
        array, ends = found.numpy(), np.cumsum([len(row.wanted) for row in rows]).tolist()
        return {row.sequence: array[a:b] for row, a, b in zip(rows, [0, *ends], ends, strict=False)}

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        self.execute(plan)  # warm up; to run a row again writes the same keys and values
        times: list[KernelTime] = []
        for rows in launches(plan.rows):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                self._run(rows)
            times += self._times(profiler.events())
        return times

    def _times(self, events: Any) -> list[KernelTime]:
        """Of the operators of one run, without those that others call."""
        outer = [
            event
            for event in sorted(events, key=lambda event: event.time_range.start)
            if event.name.startswith("aten::")
            and (event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::"))
        ]
        # The archive has no paths of modules; its linear layers run in the order in which they were traced.
        named = iter(
            self._facts.linears if sum(e.name == "aten::linear" for e in outer) == len(self._facts.linears) else ()
        )
        times = []
        for event in outer:
            path, size = next(named, ("", 0)) if event.name == "aten::linear" else ("", 0)
            times.append(KernelTime(path or event.name, event.name, event.cpu_time_total / 1e6, size))
        return times

    def close(self) -> None:
        self._module, self._cache = None, []
        self._pool = Pool((), 0)


def _cache_of(pool: Pool) -> list[Tensor]:
    """Keys and values of each layer in turn, as the archive takes them."""
    return [tensor for pair in zip(pool.keys, pool.values, strict=True) for tensor in pair]
