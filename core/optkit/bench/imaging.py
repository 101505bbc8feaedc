"""The two ways to run an image classifier that every benchmark sets side by side: transformers' own, and ours."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from optkit.backends import TensorSession
from optkit.batching import Batcher
from optkit.bench.arms import all_cores
from optkit.bench.interleave import ImageArm
from optkit.engine.arrays import ArrayEngine
from optkit.engine.images import classify
from optkit.errors import DamagedError, GateFailed
from optkit.metrics import ImageRun
from optkit.model import Model
from optkit.steps import Limits

__all__ = ["SessionImageArm", "TransformersImageArm"]

_BATCH_SIZE = 32


class TransformersImageArm(ImageArm):
    """Batches of 32 through the transformers module: what a user has before optimizing anything."""

    def __init__(self, model: Model, name: str) -> None:
        self.name = name
        self.model: Model | None = model

    def run(self, pixels: npt.NDArray[np.float32]) -> ImageRun:
        import torch

        assert self.model is not None, "the arm is closed"
        module: Any = self.model.module
        with all_cores(), torch.inference_mode():
            begin = time.perf_counter()
            batches = [
                module(pixel_values=torch.from_numpy(pixels[start : start + _BATCH_SIZE])).logits.float().numpy()
                for start in range(0, len(pixels), _BATCH_SIZE)
            ]
            seconds = time.perf_counter() - begin
        if not all(np.isfinite(logits).all() for logits in batches):
            raise DamagedError("the baseline gives NaN or infinite logits", remedy="check the model's files")
        return ImageRun(sum(map(len, batches)), seconds)

    def close(self) -> None:
        self.model = None


class SessionImageArm(ImageArm):
    """All images through the engine at once, each a request of its own. Closes the session.

    Args:
        session: over the model; nothing else may run in it meanwhile.
        batcher: the strategy of the recipe.
        limits: that the session was opened for.
        name: of the arm.
    """

    def __init__(self, session: TensorSession, batcher: Batcher, limits: Limits, name: str) -> None:
        self.name = name
        self.session = session
        self._batcher, self._limits = batcher, limits

    def run(self, pixels: npt.NDArray[np.float32]) -> ImageRun:
        with all_cores():
            begin = time.perf_counter()
            logits = classify(ArrayEngine(self.session, self._batcher, self._limits), pixels)
            seconds = time.perf_counter() - begin
        if not np.isfinite(logits).all():
            raise GateFailed("the model gives NaN or infinite logits", where=self.name)
        return ImageRun(len(logits), seconds)

    def close(self) -> None:
        self.session.close()
