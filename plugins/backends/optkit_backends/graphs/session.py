"""Sessions over compiled graphs: of a decoder with keys and values in paged blocks, and of a model of one call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optkit.backends import TensorSession
from optkit.steps import KernelTime, Limits, Row, StepPlan, StepResult, TensorSpec
from optkit_backends.graphs.launch import Launch, cache_of, launches
from optkit_backends.graphs.tensors import Described
from optkit_backends.graphs.timing import Product, Profiled
from optkit_backends.torch.pool import LayerShape, Pool, PooledSession

__all__ = ["GraphSession", "GraphTensorSession"]

Floats = npt.NDArray[np.float32]


class GraphSession(PooledSession):
    """Runs a `DecoderGraph` that was compiled; see `optkit.backends.TokenSession`.

    Attributes:
        PROFILED: what the profiler calls its kernels.
    """

    PROFILED: ClassVar[Profiled]

    def __init__(
        self,
        limits: Limits,
        layers: Sequence[LayerShape],
        windows: Sequence[int | None],
        products: Sequence[Product],
        vocab_size: int,
    ) -> None:
        self._windows, self._products = windows, products
        self._pool = Pool.within(limits, layers)
        self._cache = cache_of(self._pool)
        self.caps = self._pool.caps(limits, vocab_size)

    @abstractmethod
    def _call(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The logits of a launch."""

    def execute(self, plan: StepPlan) -> StepResult:
        logits: dict[int, Floats] = {}
        for rows in launches(plan.rows):
            logits |= self._run(rows)
        return StepResult(tuple(logits[row.sequence] for row in plan.rows))

    def _run(self, rows: Sequence[Row]) -> dict[int, Floats]:
        launch = Launch.of(rows, self._windows)
        array = self._call((*launch.tensors, *self._cache)).numpy()
        ends = np.cumsum([len(row.wanted) for row in rows]).tolist()
        return {row.sequence: array[a:b] for row, a, b in zip(rows, [0, *ends], ends, strict=False)}

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        self.execute(plan)  # warm up; to run a row again writes the same keys and values
        parts = [self.PROFILED.times(partial(self._run, rows), self._products) for rows in launches(plan.rows)]
        return [*chain.from_iterable(parts)]

    def close(self) -> None:
        self._pool, self._cache = Pool((), 0), []


class GraphTensorSession(TensorSession):
    """Runs a `TensorGraph` that was compiled; see `optkit.backends.TensorSession`.

    Attributes:
        PROFILED: what the profiler calls its kernels.
    """

    PROFILED: ClassVar[Profiled]

    def __init__(self, inputs: Described, outputs: Described, products: Sequence[Product]) -> None:
        self._products = products
        self.inputs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in inputs.items()}
        self.outputs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in outputs.items()}

    @abstractmethod
    def _call(self, inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """The outputs in their order."""

    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        # What was compiled reads rows, whatever the strides say.
        found = self._call(tuple(torch.from_numpy(np.asarray(inputs[name], order="C")) for name in self.inputs))
        return {name: tensor.numpy() for name, tensor in zip(self.outputs, found, strict=True)}

    def profile(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> list[KernelTime]:
        self.run(inputs)  # warm up
        return self.PROFILED.times(lambda: self.run(inputs), self._products)
