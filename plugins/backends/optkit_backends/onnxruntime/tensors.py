"""A compiled model of one step as a session: encoders, vision."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from optkit.backends import TensorSession
from optkit.errors import DamagedError
from optkit.steps import KernelTime, TensorSpec
from optkit_backends.onnxruntime.files import GRAPH, TensorFacts
from optkit_backends.onnxruntime.loading import load
from optkit_backends.onnxruntime.trace import kernel_times

__all__ = ["OnnxTensorSession"]

DTYPES = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(bool)": "bool", "tensor(uint8)": "uint8"}


class OnnxTensorSession(TensorSession):
    """Runs what `compile_model` or `compile_tensors` wrote; see `optkit.backends.TensorSession`.

    Args:
        directory: holds the files.
        threads: of all calls together.
        streams: calls at the same time.
        settings: the other keyword arguments of `loading.load`.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
    """

    def __init__(self, directory: Path, *, threads: int, streams: int = 1, **settings: Any) -> None:
        facts = TensorFacts.read(directory)
        graph = directory / GRAPH
        self._graph = graph
        # The thread that makes a call computes as well, beside those of the session, which all calls share.
        self._settings = settings | {"threads": max(1, threads - streams + 1)}
        self.streams = streams
        self._session: Any = load(graph, **self._settings)
        self.inputs = {value.name: _spec(value) for value in self._session.get_inputs()}
        self.outputs = {value.name: _spec(value) for value in self._session.get_outputs()}
        found = [list(self.inputs), list(self.outputs)]
        if found != [facts.inputs, facts.outputs]:
            raise DamagedError("has other inputs and outputs than were written", where=str(graph), found=found)

    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        return dict(zip(self.outputs, self._session.run(None, self._feed(inputs)), strict=True))

    def profile(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> list[KernelTime]:
        with tempfile.TemporaryDirectory() as scratch:
            session = load(self._graph, **self._settings, trace=Path(scratch) / "trace")
            for _ in range(2):  # the first run makes room
                session.run(None, self._feed(inputs))
            return kernel_times(Path(session.end_profiling()), self._graph, runs=1)

    def _feed(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        return {name: inputs[name] for name in self.inputs}

    def close(self) -> None:
        self._session = None


def _spec(value: Any) -> TensorSpec:
    """The runtime's own description, whose axes of any size have a name or nothing."""
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(DTYPES[value.type], shape)
