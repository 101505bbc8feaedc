"""A compiled model of one call as a session: encoders, vision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from optkit_backends.graphs.session import GraphTensorSession
from optkit_backends.graphs.timing import Profiled
from optkit_backends.torchscript.files import PROFILED, ArchivedTensors, load, running

__all__ = ["TorchScriptTensorSession"]


class TorchScriptTensorSession(GraphTensorSession):
    """Runs what `compile_model` or `compile_tensors` wrote; see `optkit.backends.TensorSession`.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
    """

    PROFILED: ClassVar[Profiled] = PROFILED

    def __init__(self, directory: Path) -> None:
        facts = ArchivedTensors.read(directory)
        self._module: Any = load(directory, facts.torch)
        super().__init__(facts.inputs, facts.outputs, facts.products)

    def _call(self, inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        with running():
            found: tuple[Tensor, ...] = self._module(*inputs)
        return found

    def close(self) -> None:
        self._module = None
