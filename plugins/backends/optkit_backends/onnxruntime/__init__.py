"""The `onnxruntime` backend: ONNX graphs of ONNX Runtime's fused operators, made for decoding on the CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from optkit.backends import Backend, Lowering, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits

__all__ = ["OnnxRuntime", "kernel_name"]

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
INTEGERS = re.compile(r"weights:int(\d)-(channel|group)(-asym)?")
BITS = (2, 4, 8)
# The first release whose attention has query_seqlens, without which rows of different widths cannot share a step.
OLDEST = (1, 32)


class OnnxRuntime(Backend):
    """ONNX Runtime on the CPU, with integer weights read by its own kernels.

    The graph is built from the loaded model: fused attention that writes its KV cache in place, fused norms, and one
    product for query, key and value. Integer weights keep their very integers. A quantized head that is tied to the
    embedding is stored once. What it gains is measured in `benchmarks/quickstart.json`.

    Document: ContribOperators.md of ONNX Runtime 1.32 (GroupQueryAttention, MatMulNBits, GatherBlockQuantized).
    """

    extra: ClassVar[str] = "onnxruntime"

    threads: int | None = Field(default=None, ge=1)
    """Threads that run one step; by default the cores that this process may use."""
    accuracy_level: Literal[1, 4] = 4
    """What integer weights are multiplied with: 4 rounds the activations to int8, block by block; 1 keeps them float32,
    which is exact, slower at 4 bits, and at 2 and 8 bits so slow that it serves only to check."""
    block_size: Literal[16, 32, 64, 128] = 64
    """Input features whose activations share a scale at accuracy level 4, or fewer where the weights' groups or a
    layer's shape need it. Small blocks lose less and run slower."""

    spin: bool = True
    """Whether threads that wait for their share of a step keep their cores busy. That makes decoding
    faster on cores of their own, and much slower on cores that run something else too."""

    def unavailable(self) -> str | None:
        remedy = "pip install 'optkit[onnxruntime]'"
        for name in ("onnxruntime", "onnx", "onnx_ir"):
            if importlib.util.find_spec(name) is None:
                return f"needs {name}; {remedy}"
        try:
            version = importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError:
            return None  # another build of the runtime, under a name of its own
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"needs onnxruntime {OLDEST[0]}.{OLDEST[1]} or later, found {version}; {remedy}"
        return None

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        lowered = {tag: self._weights(tag) for tag in sorted(tags) if tag.startswith("weights:")}
        lowered |= {
            tag: _impossible("only causal language models run on it")
            for tag in sorted(tags)
            if tag.startswith("task:") and tag != "task:causal-lm"
        }
        lowered |= {
            tag: _impossible(f"its graphs are of {', '.join(ARCHITECTURES)}")
            for tag in sorted(tags)
            if tag.startswith("arch:") and tag.removeprefix("arch:") not in ARCHITECTURES
        }
        if "shape:pruned" in tags:
            lowered["shape:pruned"] = _impossible("its graphs have the same shapes in every layer")
        return lowered

    def _weights(self, tag: str) -> Lowering:
        if tag == "weights:float":
            return Lowering("Gemm (float32)", native=True, tolerance=1e-4)
        match = INTEGERS.fullmatch(tag)
        if match is None:
            return _impossible("it has no kernel for this format")
        bits = int(match[1])
        if bits not in BITS:
            return _impossible(f"MatMulNBits stores 2, 4 or 8 bits, not {bits}")
        kernel = kernel_name(bits, self.accuracy_level)
        if self.accuracy_level == 4:
            # Two to three times what SmolLM2-135M, whose activations have outliers, shows with blocks of 64.
            return Lowering(kernel, native=True, tolerance=0.15)
        if bits == 4:
            return Lowering(kernel, native=True, tolerance=1e-4)
        reason = "at accuracy_level 1 the kernel unpacks all weights in every step: slower than float weights"
        return Lowering(kernel, native=False, tolerance=1e-4, reason=reason)

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # The file is mapped, and its matrices are rearranged into a copy that the kernels read.
        return 2 * weight_bytes

    def compile(self, model: Model, directory: Path) -> None:
        from optkit_backends.onnxruntime.graph import compile_module

        compile_module(model.module, directory, accuracy_level=self.accuracy_level, block_size=self.block_size)

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession:
        from optkit import hardware
        from optkit_backends.onnxruntime.session import OnnxSession

        return OnnxSession(runtime, limits, threads=self.threads or hardware.usable_cores(), spin=self.spin)


def kernel_name(bits: int, accuracy_level: int) -> str:
    """How reports call MatMulNBits with these settings."""
    return f"MatMulNBits ({bits}-bit, {'int8' if accuracy_level == 4 else 'float32'} activations)"


def _impossible(reason: str) -> Lowering:
    return Lowering("", native=False, reason=reason)
