"""A compiled model of one call as a session: encoders, vision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from optkit.backends import TensorSession
from optkit.steps import TensorSpec
from optkit_backends.torchscript.files import TensorFacts, load, running

__all__ = ["TorchScriptTensorSession"]


class TorchScriptTensorSession(TensorSession):
    """Runs what `compile_encoder` or `compile_tensors` wrote; see `optkit.backends.TensorSession`.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
    """

    def __init__(self, directory: Path) -> None:
        facts = TensorFacts.read(directory)
        self._module: Any = load(directory, facts.torch)
        self.inputs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in facts.inputs.items()}
        self.outputs = {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in facts.outputs.items()}

    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        with running():
            found = self._module(*(torch.from_numpy(inputs[name]) for name in self.inputs))
        return {name: tensor.numpy() for name, tensor in zip(self.outputs, found, strict=True)}

    def close(self) -> None:
        self._module = None
