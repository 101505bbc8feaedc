"""The thread of the engines over one session of a model of one step: jobs in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from optkit.engine.arrays import Arrays
from optkit.engine.one_step import OneStepEngine, Outcome, TensorStats
from optkit.engine.opened_tensors import OpenedTensors
from optkit.engine.pooling import Pooling
from optkit.engine.stepping import Stepping
from optkit.errors import MachineError, RequestError

__all__ = ["TensorStepper"]

Deliver = Callable[[int, Any], None]


@dataclass(frozen=True, slots=True)
class _Embedding:
    key: int
    sequences: Sequence[tuple[int, ...]]
    normalize: bool | None


@dataclass(frozen=True, slots=True)
class _Inference:
    key: int
    inputs: Arrays


@dataclass(frozen=True, slots=True)
class _Cancellation:
    key: int


@dataclass(frozen=True, slots=True)
class _Job:
    """What is answered at once, when all of its requests have ended."""

    key: int
    engine: OneStepEngine[Any, Any]
    places: dict[int, int]
    """Open requests, and where in `parts` their results go."""
    parts: list[Any]
    finish: Callable[[Any], Any]
    """Makes a part of a request's result."""
    gather: Callable[[list[Any]], Any]
    """Makes the answer of the parts."""


class TensorStepper(Stepping[_Embedding | _Inference | _Cancellation]):
    """Owns the steps of both engines; see `Stepping`. They take turns, so that neither kind of job starves the other.

    Args:
        opened: nobody else calls its engines from now on.
        begun: called there with the key of a job that the engines are about to get.
        deliver: called, mostly there, with the key of a job and its answer, or an exception: once for every job that
            was not cancelled.
        failed: called there after an exception out of an engine, when all has ended.
    """

    def __init__(
        self,
        opened: OpenedTensors,
        begun: Callable[[int], None],
        deliver: Deliver,
        failed: Callable[[], None] | None = None,
    ) -> None:
        self._texts, self._arrays = opened.texts, opened.arrays
        self._pooling = opened.pooling or Pooling()
        self._engines: list[OneStepEngine[Any, Any]] = [one for one in (opened.texts, opened.arrays) if one is not None]
        self._begun, self._deliver = begun, deliver
        self._jobs: dict[int, _Job] = {}
        self._owners: dict[tuple[int, int], _Job] = {}
        super().__init__(failed)

    @property
    def stats(self) -> TensorStats:
        """Counters of both engines together; while a step runs they may be in the middle of it."""
        names = [field.name for field in fields(TensorStats)]
        return TensorStats(**{name: sum(getattr(engine.stats, name) for engine in self._engines) for name in names})

    def embed(self, key: int, sequences: Sequence[tuple[int, ...]], normalize: bool | None) -> None:
        """Hand in sequences of token ids, whose answer is `[sequences, hidden]` float32.

        Args:
            key: the caller's name for the job, not in use by another open one.
            sequences: at least one.
            normalize: in the place of the model's own.
        """
        self._put(_Embedding(key, sequences, normalize))

    def infer(self, key: int, inputs: Arrays) -> None:
        """Hand in rows of the model's inputs, whose answer is the same rows of its outputs. `key` as in `embed`."""
        self._put(_Inference(key, inputs))

    def cancel(self, key: int) -> None:
        """Forget a job: what has not begun is not computed. One that is unknown or has ended is left alone."""
        self._put(_Cancellation(key))

    @property
    def _pause(self) -> float | None:
        return min((engine.wait or 0.0 for engine in self._engines if engine.busy), default=None)

    def _take(self, message: _Embedding | _Inference | _Cancellation) -> None:
        if isinstance(message, _Cancellation):
            if message.key in self._jobs:
                self._drop(self._jobs[message.key])
            return
        self._begun(message.key)
        try:
            self._enter(self._embedding(message) if isinstance(message, _Embedding) else self._inference(message))
        except Exception as error:
            self._deliver(message.key, error)

    def _embedding(self, one: _Embedding) -> _Job:
        if self._texts is None:
            raise RequestError("the model is no text encoder")
        if not one.sequences:
            raise RequestError("there are no sequences to encode")
        places: dict[int, int] = {}
        try:
            for place, ids in enumerate(one.sequences):
                places[self._texts.add(ids)] = place
        except Exception as error:
            for request in places:
                self._texts.cancel(request)
            if isinstance(error, RequestError):
                where = f"text {len(places)}"
                raise RequestError(error.what, where=where, found=error.found, remedy=error.remedy) from error
            raise

        def pooled(hidden: Any) -> Any:
            return self._pooling(hidden, normalize=one.normalize)

        return _Job(one.key, self._texts, places, [None] * len(places), pooled, np.stack)

    def _inference(self, one: _Inference) -> _Job:
        places = {self._arrays.add(one.inputs): 0}
        return _Job(one.key, self._arrays, places, [None], lambda outputs: outputs, lambda parts: parts[0])

    def _enter(self, job: _Job) -> None:
        self._jobs[job.key] = job
        for request in job.places:
            self._owners[id(job.engine), request] = job

    def _drop(self, job: _Job) -> None:
        del self._jobs[job.key]
        for request in job.places:
            del self._owners[id(job.engine), request]
            job.engine.cancel(request)

    def _step(self) -> None:
        for engine in self._engines:
            if engine.busy:
                for outcome in engine.step():
                    job = self._owners.pop((id(engine), outcome.request), None)
                    if job is not None:  # otherwise nobody waits any more
                        self._ended(job, outcome)

    def _ended(self, job: _Job, outcome: Outcome[Any]) -> None:
        place = job.places.pop(outcome.request)
        if outcome.finished == "done":
            job.parts[place] = job.finish(outcome.result)
            if not job.places:
                del self._jobs[job.key]
                self._deliver(job.key, job.gather(job.parts))
            return
        self._drop(job)
        if outcome.finished == "cancelled":  # all are: it is being closed
            self._deliver(job.key, self._refusal())
            return
        where = f"text {place}" if job.engine is self._texts else ""
        self._deliver(job.key, MachineError(f"the model failed ({outcome.error})", where=where))

    def _cancel_all(self) -> None:
        for job in self._jobs.values():
            for request in job.places:
                job.engine.cancel(request)

    def _end_all(self, failure: str) -> None:
        left, self._jobs = list(self._jobs), {}
        for key in left:
            self._deliver(key, self._refusal())

    def _refuse(self, message: _Embedding | _Inference | _Cancellation, error: MachineError) -> None:
        if not isinstance(message, _Cancellation):
            self._deliver(message.key, error)
