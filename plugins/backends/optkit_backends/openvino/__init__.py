"""The `openvino` backend: encoders, image classifiers, and any module of tensors, as graphs of Intel's runtime."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from optkit import hardware
from optkit.backends import Backend, Lowering, TensorSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit.weights import CAUSAL_LM
from optkit_backends.tasks import ONE_CALL, other_task

__all__ = ["ROUNDING_TOLERANCE", "OpenVINO"]

INTEGERS = re.compile(r"weights:int([2-8])-(channel|group)(-asym)?")
ACTIVATIONS = re.compile(r"activations:int8-(dynamic|static)(-asym)?")
PRODUCT = "FullyConnected"
# Where sums differ in their last bits a rounding now and then tips, and each layer multiplies what the ones before
# tipped: on MiniLM to two thirds of the rounding error itself. Twice what that shows.
ROUNDING_TOLERANCE = 0.3
# What the kernels that read integer weights need.
READING = "avx2"
OLDEST = (2026, 4)


class OpenVINO(Backend):
    """OpenVINO on the CPU, for encoders and image classifiers. Its kernels read integer weights as they are stored.

    The model is traced once and saved in OpenVINO's own format, which opens without torch and transformers. The runtime
    fuses attention, norms and activations when it opens it, for the processor at hand. Everything is computed in
    float32, also on processors where OpenVINO would choose bfloat16 by itself.

    Integer weights take a quarter of the space or an eighth, and are multiplied with float32, which in batches of many
    tokens is no faster than float weights. Static int8 activations are multiplied as integers on processors with VNNI
    or AMX; on others they are rounded in float32, since OpenVINO's integer products overflow 16 bits there. Dynamic
    ones are rounded in float32 everywhere.

    Document: https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html
    """

    extra: ClassVar[str] = "openvino"

    threads: int | None = Field(default=None, ge=1)
    """Threads that run batches; by default the cores that this process may use."""
    streams: int = Field(default=1, ge=1)
    """Batches that run at the same time and share the threads. More than one raise how many are done in a second, as
    threads wait less for each other, and make each take longer."""

    def unavailable(self) -> str | None:
        remedy = "pip install 'optkit[openvino]'"
        if importlib.util.find_spec("openvino") is None:
            return f"needs openvino; {remedy}"
        try:
            version = importlib.metadata.version("openvino")
        except importlib.metadata.PackageNotFoundError:
            return None  # built from source
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"needs openvino {OLDEST[0]}.{OLDEST[1]} or later, found {version}; {remedy}"
        return None

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        lowered = {tag: _weights(tag) for tag in sorted(tags) if tag.startswith("weights:")}
        lowered |= {tag: _activations(tag) for tag in sorted(tags) if tag.startswith("activations:")}
        lowered |= {
            tag: _impossible("its models keep no keys and values") for tag in sorted(tags) if tag.startswith("kv:")
        }
        remedy = "; openvino_genai runs language models" if CAUSAL_LM in tags else ""
        reason = f"it has no KV cache, and runs encoders and image classifiers only{remedy}"
        return lowered | other_task(tags, ONE_CALL, reason)

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # The graph's weights, and the copy that the kernels read, in their order.
        return 2 * weight_bytes

    def compile(self, model: Model, directory: Path) -> None:
        from optkit_backends.openvino.conversion import compile_model

        compile_model(model, directory)

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TensorSession:
        from optkit_backends.openvino.tensors import OpenVINOTensorSession

        threads = self.threads or hardware.usable_cores()
        return OpenVINOTensorSession(
            runtime, threads=threads, streams=self.streams, integer_products=hardware.exact_byte_products()
        )


def _weights(tag: str) -> Lowering:
    if tag == "weights:float":
        return Lowering(f"{PRODUCT} (float32)", native=True, tolerance=1e-4)
    match = INTEGERS.fullmatch(tag)
    if match is None:
        return _impossible("it has no kernel for this format")
    stored = 4 if int(match[1]) <= 4 else 8
    reason = "" if int(match[1]) in (4, 8) else f"stored in {stored} bits each"
    native = READING in hardware.isa()
    if not native:
        reason = f"its kernels for integer weights need {READING}; without it they may become floats when opened"
    return Lowering(f"{PRODUCT} (int{stored} weights)", native=native, tolerance=1e-4, reason=reason)


def _activations(tag: str) -> Lowering:
    match = ACTIVATIONS.fullmatch(tag)
    if match is None:
        return _impossible("it rounds activations to int8, by token or by calibration")
    if match[1] == "static" and hardware.exact_byte_products():
        return Lowering(f"{PRODUCT} (int8)", native=True, tolerance=ROUNDING_TOLERANCE)
    return Lowering(
        "inputs rounded to int8 in float32",
        native=False,
        tolerance=ROUNDING_TOLERANCE,
        reason="rounded in float32: quality is that of the artifact, speed is not",
    )


def _impossible(reason: str) -> Lowering:
    return Lowering("", native=False, reason=reason)
