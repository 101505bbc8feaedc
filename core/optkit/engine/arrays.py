"""The engine of plain arrays: any model of one step, whose requests share calls where their shapes allow it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optkit.backends import TensorSession
from optkit.batching import Batcher
from optkit.engine.one_step import OneStepEngine
from optkit.errors import OptkitError, RequestError
from optkit.steps import Limits, TensorSpec

__all__ = ["ArrayEngine", "Arrays"]

Arrays = Mapping[str, npt.NDArray[np.generic]]
"""By name of the model's input or output; the first axis is the batch."""


class ArrayEngine(OneStepEngine[Arrays, Arrays]):
    """Drives one session with one batcher. One thread calls it at a time.

    See `OneStepEngine`. A request is some rows of every input, and its result the same rows of every output. Requests
    that are equal in all axes but the first share a call. To the batcher each counts as one token long, and with its
    rows as samples.

    Args:
        session: the engine does not close it.
        batcher: decides who shares a batch.
        limits: that the session was opened for.
        bounds: for a text encoder, what the values of an input are held below, by its name: a token that the model
            does not have may crash a runtime. All inputs then have one shape, `[batch, tokens]`, of at most
            `limits.max_length` tokens.
        clock: seconds, for the batcher; tests pass their own.
    """

    def __init__(
        self,
        session: TensorSession,
        batcher: Batcher,
        limits: Limits,
        bounds: Mapping[str, int] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(batcher, limits, clock=clock, streams=session.streams)
        self._session, self._bounds = session, bounds

    def add(self, payload: Arrays) -> int:
        """Accept some rows and return the request's id.

        Raises:
            RequestError: they are not what the model takes, or too many.
        """
        self._check(payload)
        rows = len(next(iter(payload.values())))
        return self._accept(payload, rows=rows, queue=tuple(payload[name].shape[1:] for name in self._session.inputs))

    def _check(self, inputs: Arrays) -> None:
        specs = self._session.inputs
        if inputs.keys() != specs.keys():
            unknown, missing = sorted(inputs.keys() - specs.keys()), sorted(specs.keys() - inputs.keys())
            what = f"there is no input {unknown[0]!r}" if unknown else f"the input {missing[0]!r} is missing"
            raise RequestError(what, remedy=f"the model takes {', '.join(specs)}")
        for name, array in inputs.items():
            _check_array(name, array, specs[name])
        sizes = {len(array) for array in inputs.values()}
        if len(sizes) > 1:
            raise RequestError("the inputs differ in their first axis, the batch", found=sorted(sizes))
        [rows] = sizes
        if not 1 <= rows <= self._memory.caps.max_batch_size:
            raise RequestError(
                f"there are {rows} rows in the batch, it can have 1 to {self._memory.caps.max_batch_size}",
                remedy="send another number of rows" if rows == 0 else "send several requests, they share batches",
            )
        if self._bounds is not None:
            self._check_tokens(inputs, self._bounds)

    def _check_tokens(self, inputs: Arrays, bounds: Mapping[str, int]) -> None:
        shapes = {array.shape for array in inputs.values()}
        if len(shapes) > 1:
            raise RequestError("the inputs differ in shape", found=sorted(shapes))
        [(_, width)] = shapes
        if not 1 <= width <= self._memory.caps.max_length:
            raise RequestError(f"the sequences have {width} tokens, they can have 1 to {self._memory.caps.max_length}")
        for name, array in inputs.items():
            values: Any = array
            end = bounds.get(name)
            if end is not None and ((values < 0) | (values >= end)).any():
                raise RequestError(f"there are values outside 0 to {end - 1}", where=name)

    def _compute(self, batch: Sequence[Arrays]) -> list[Arrays]:
        # Also of a single request: its own arrays may be read-only, which runtimes do not take.
        outputs = self._session.run(
            {name: np.concatenate([one[name] for one in batch]) for name in self._session.inputs}
        )
        ends = np.cumsum([len(next(iter(one.values()))) for one in batch])
        for name, array in outputs.items():
            if array.shape[:1] != (ends[-1],):
                raise OptkitError(f"the output {name!r} has shape {array.shape} for {ends[-1]} rows")
        parts = {name: np.split(array, ends[:-1]) for name, array in outputs.items()}
        return [{name: parts[name][place] for name in outputs} for place in range(len(batch))]


def _check_array(name: str, array: npt.NDArray[np.generic], spec: TensorSpec) -> None:
    if array.dtype != np.dtype(spec.dtype):
        raise RequestError(f"is {array.dtype}, the model takes {spec.dtype}", where=name)
    fits = len(array.shape) == len(spec.shape) and all(
        wanted in (None, size) for size, wanted in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
        raise RequestError(f"has shape {list(array.shape)}, the model takes [{wanted}]", where=name)
