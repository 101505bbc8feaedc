"""A transformers module as a session: the new tokens of all rows on one axis, keys and values in paged blocks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optkit.kv import stop_rounding
from optkit.steps import KernelTime, Limits, StepPlan, StepResult
from optkit.weights import load_folder
from optkit_backends.torch.attention import Attention, PagedAttention
from optkit_backends.torch.dense import make_dense
from optkit_backends.torch.pool import Pool, PooledSession
from optkit_backends.torch.probe import page
from optkit_backends.torch.timing import timed

__all__ = ["TorchSession"]


class TorchSession(PooledSession):
    """Runs the model of a weights folder; see `optkit.backends.TokenSession`.

    A row's logits come from its own tokens and blocks alone. They still can differ in the last bits with what else is
    in the step, because matrix products of another number of rows may run another kernel, which sums in another order.
    """

    def __init__(self, weights: Path, limits: Limits) -> None:
        module: Any = load_folder(weights).module
        make_dense(module)
        stop_rounding(module)
        paged = page(module, str(weights))
        paged.check(limits.max_length, weights)
        self._module, self._pool = module, Pool.within(limits, paged.layers)
        self.caps = self._pool.caps(limits, module.config.vocab_size)

    def execute(self, plan: StepPlan) -> StepResult:
        step = PagedAttention(plan.rows, self._pool)
        return self._run(plan, step, step)

    def _run(self, plan: StepPlan, step: PagedAttention, attention: Attention) -> StepResult:
        kept: list[int] = []
        ends: list[int] = []
        end = 0
        for row in plan.rows:
            start, end = end, end + len(row.tokens)
            kept += range(start + row.wanted.start, start + row.wanted.stop)
            ends.append(len(kept))
        with torch.inference_mode():
            logits = self._module(
                input_ids=step.tokens,
                position_ids=step.positions,
                use_cache=False,
                logits_to_keep=torch.tensor(kept, dtype=torch.long),
                paged=attention,
            ).logits
        array = logits[0].float().numpy()
        return StepResult(tuple(array[a:b] for a, b in zip([0, *ends], ends, strict=False)))

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        self.execute(plan)  # warm up; to run a row again writes the same keys and values
        times: list[KernelTime] = []
        names = {layer: name for name, layer in self._module.named_modules()}
        with timed(self._module, times, "residuals, rotary angles and dispatch"):
            step = PagedAttention(plan.rows, self._pool)
            self._run(plan, step, _Timed(step, names, times))
        return times

    def close(self) -> None:
        self._module = None
        self._pool = Pool((), 0)


class _Timed:
    """Attention that notes how long it took in each layer."""

    def __init__(self, inner: Attention, names: dict[nn.Module, str], times: list[KernelTime]) -> None:
        self._inner, self._names, self._times = inner, names, times

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        begin = time.perf_counter()
        found = self._inner.attend(module, query, key, value, options)
        seconds = time.perf_counter() - begin
        self._times.append(KernelTime(self._names[module], "scaled_dot_product_attention, paged", seconds))
        return found
