"""Transformers' encoders and image classifiers as sessions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from optkit.backends import TensorSession
from optkit.model import Model
from optkit.steps import KernelTime, TensorSpec
from optkit.weights import ImagePreparation, load_folder
from optkit_backends.torch.dense import make_dense
from optkit_backends.torch.timing import timed

__all__ = ["TorchImageSession", "TorchTensorSession"]


class _ModuleSession(TensorSession):
    """Runs the model of a weights folder in float32."""

    REST: ClassVar[str]
    """What runs between its layers."""

    def __init__(self, weights: Path) -> None:
        model = load_folder(weights)
        self._describe(model)
        make_dense(model.module)
        self._module: Any = model.module

    @abstractmethod
    def _describe(self, model: Model) -> None:
        """Set `inputs` and `outputs`."""

    def profile(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> list[KernelTime]:
        self.run(inputs)  # warm up
        times: list[KernelTime] = []
        with timed(self._module, times, self.REST):
            self.run(inputs)
        return times

    def close(self) -> None:
        self._module = None


class TorchTensorSession(_ModuleSession):
    """Runs the encoder of a weights folder in float32; see `optkit.backends.TensorSession`.

    Inputs are `input_ids` and `attention_mask` `[batch, tokens]` int64, padded on the right; the output is
    `last_hidden_state` `[batch, tokens, hidden]` float32. What it says of padding means nothing.
    """

    REST = "attention, residuals and dispatch"

    def _describe(self, model: Model) -> None:
        config: Any = model.module.config
        self.inputs = dict.fromkeys(("input_ids", "attention_mask"), TensorSpec("int64", (None, None)))
        self.outputs = {"last_hidden_state": TensorSpec("float32", (None, None, config.hidden_size))}

    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        ids, mask = (torch.from_numpy(inputs[name]) for name in self.inputs)
        with torch.inference_mode():
            hidden = self._module(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"last_hidden_state": hidden.float().numpy()}


class TorchImageSession(_ModuleSession):
    """Runs the image classifier of a weights folder in float32; see `optkit.backends.TensorSession`.

    The input is `pixel_values` `[batch, channels, height, width]` float32, the output `logits` `[batch, classes]`
    float32.
    """

    REST = "functions between layers, and dispatch"

    def _describe(self, model: Model) -> None:
        preparation = ImagePreparation.of(model)
        self.inputs = {"pixel_values": TensorSpec("float32", (None, *preparation.shape))}
        self.outputs = {"logits": TensorSpec("float32", (None, len(preparation.labels)))}

    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        with torch.inference_mode():
            logits = self._module(pixel_values=torch.from_numpy(inputs["pixel_values"])).logits
        return {"logits": logits.float().numpy()}
