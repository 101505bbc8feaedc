"""A transformers encoder as a session: padded batches in, the last layer's output back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from optkit.backends import TensorSession
from optkit.steps import KernelTime, TensorSpec
from optkit.weights import load_folder
from optkit_backends.torch.dense import make_dense
from optkit_backends.torch.timing import timed

__all__ = ["TorchTensorSession"]


class TorchTensorSession(TensorSession):
    """Runs the encoder of a weights folder in float32; see `optkit.backends.TensorSession`.

    Inputs are `input_ids` and `attention_mask` `[batch, tokens]` int64, padded on the right; the output is
    `last_hidden_state` `[batch, tokens, hidden]` float32. What it says of padding means nothing.
    """

    def __init__(self, weights: Path) -> None:
        module: Any = load_folder(weights).module
        self.inputs = dict.fromkeys(("input_ids", "attention_mask"), TensorSpec("int64", (None, None)))
        self.outputs = {"last_hidden_state": TensorSpec("float32", (None, None, module.config.hidden_size))}
        make_dense(module)
        self._module = module

    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        ids, mask = (torch.from_numpy(inputs[name]) for name in self.inputs)
        with torch.inference_mode():
            hidden = self._module(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"last_hidden_state": hidden.float().numpy()}

    def profile(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> list[KernelTime]:
        self.run(inputs)  # warm up
        times: list[KernelTime] = []
        with timed(self._module, times, "attention, residuals and dispatch"):
            self.run(inputs)
        return times

    def close(self) -> None:
        self._module = None
