"""A compiled model of one call as a session: encoders, vision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from optkit_backends.aot_inductor.files import PROFILED, PackagedTensors, load
from optkit_backends.graphs.session import GraphTensorSession
from optkit_backends.graphs.timing import Profiled

__all__ = ["AOTInductorTensorSession"]


class AOTInductorTensorSession(GraphTensorSession):
    """Runs what `compile_model` or `compile_tensors` wrote; see `optkit.backends.TensorSession`.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
        MachineError: the package is for another machine or version of torch.
    """

    PROFILED: ClassVar[Profiled] = PROFILED

    def __init__(self, directory: Path) -> None:
        facts = PackagedTensors.read(directory)
        self._package: Any = load(directory, facts)
        super().__init__(facts.inputs, facts.outputs, facts.products)

    def _call(self, inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        with torch.inference_mode():
            found: Sequence[Tensor] = self._package(*inputs)
        return found

    def close(self) -> None:
        self._package = None
