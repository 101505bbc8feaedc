"""Image classifiers as models of arrays: one input, one output."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from optkit.backends import TensorSession
from optkit.engine.arrays import ArrayEngine, Arrays
from optkit.engine.one_step import run_all

__all__ = ["LOGITS", "PIXELS", "classifies_images", "classify"]

Floats = npt.NDArray[np.float32]
PIXELS = "pixel_values"
"""The input of a session that classifies images, `[batch, channels, height, width]` float32."""
LOGITS = "logits"
"""Its output, `[batch, classes]` float32."""


def classifies_images(session: TensorSession) -> bool:
    """Whether a session is that of an image classifier, by the names of its inputs and outputs."""
    return set(session.inputs) == {PIXELS} and LOGITS in session.outputs


def classify(engine: ArrayEngine, pixels: Floats) -> Floats:
    """Run prepared images through an engine that does nothing else meanwhile, each a request of its own.

    Args:
        engine: over a session that classifies images.
        pixels: `[images, channels, height, width]`.

    Returns:
        `[images, classes]` float32.

    Raises:
        MachineError: the model failed on an image, which is named; nothing goes on.
    """

    def logits(outputs: Arrays) -> Floats:
        found: Floats = outputs[LOGITS][0].astype(np.float32, copy=False)
        return found

    return np.stack(run_all(engine, [{PIXELS: pixels[i : i + 1]} for i in range(len(pixels))], "image", logits))
