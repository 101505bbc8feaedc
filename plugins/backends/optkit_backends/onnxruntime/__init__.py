"""The `onnxruntime` backend: decoders and encoders as graphs of ONNX Runtime's fused and integer operators."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from optkit.backends import Backend, Lowering, TensorSession, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit.weights import CAUSAL_LM, IMAGE_CLASSIFICATION
from optkit_backends.tasks import ONE_CALL, other_task

__all__ = ["CPU", "OnnxRuntime", "kernel_name"]

CPU = "CPUExecutionProvider"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
INTEGERS = re.compile(r"weights:int(\d)-(channel|group)(-asym)?")
BITS = (2, 4, 8)
INTEGER_PRODUCT = "MatMulIntegerToFloat (int8)"
# Sums are exact. Floats between them differ in their last bits, which now and then tips a rounding, and each layer
# multiplies what the ones before tipped: on MiniLM to two thirds of the rounding error itself. Twice what that shows.
STATIC_TOLERANCE = 0.3
# Likewise by token: MiniLM shows 0.08 where the model rounds as well, and 0.1 where it keeps its activations.
DYNAMIC_TOLERANCE = 0.2
CACHES = {"kv:int8-head": "PER_CHANNEL", "kv:int8-tensor": "PER_TENSOR"}
# The first release whose attention has query_seqlens, without which rows of different widths cannot share a step.
OLDEST = (1, 32)


class OnnxRuntime(Backend):
    """ONNX Runtime on the CPU, with integer weights read by its own kernels.

    The graph is built from the loaded model: fused attention that writes its KV cache in place, fused norms, and one
    product for query, key and value. Integer weights keep their very integers. A quantized head that is tied to the
    embedding is stored once. Weights lie in huge pages where Linux gives them on request. What it gains is measured in
    `benchmarks/quickstart.json`, and beside onnxruntime-genai in `benchmarks/cpu_lm/cpu_lm-onnxruntime.json`.

    Encoders and image classifiers come from torch's own exporter, of any architecture that it can express; an encoder's
    attention is one operator.
    Batches of about 512 tokens run fastest, for what a layer passes to the next stays in the cache (`max_batch_tokens`
    of `bucketed`). Int8 activations, static or by token, are multiplied as integers, exactly on every processor.
    Where x86 has no VNNI, weights of 8 bits run in kernels that cannot saturate: those take half as long again as the
    ones that weights of 7 bits get, and both are faster than float32. With VNNI both run in the same kernels. What
    encoders gain is measured in `benchmarks/encoders/encoders.json`, and with VNNI in `encoders-xeon.json`.

    Document: ContribOperators.md of ONNX Runtime 1.32 (GroupQueryAttention, MatMulNBits, GatherBlockQuantized,
    MultiHeadAttention, MatMulIntegerToFloat).
    """

    extra: ClassVar[str] = "onnxruntime"

    threads: int | None = Field(default=None, ge=1)
    """Threads that run steps; by default the cores that this process may use."""
    streams: int = Field(default=1, ge=1)
    """Batches of an encoder or image classifier that run at the same time and share the threads. More than one raise
    how many are done in a second, as threads wait less for each other, and make each take longer."""
    accuracy_level: Literal[1, 4] = 4
    """What integer weights are multiplied with: 4 rounds the activations to int8, block by block, or in encoders whose
    8-bit weights have one scale for each output channel token by token, which is faster; 1 keeps them float32, which is
    exact, slower at 4 bits, and at 2 and 8 bits so slow that it serves only to check."""
    block_size: Literal[16, 32, 64, 128] = 64
    """Input features whose activations share a scale at accuracy level 4, or fewer where the weights' groups or a
    layer's shape need it. Small blocks lose less and run slower."""

    spin: bool = True
    """Whether threads that wait for their share of a step keep their cores busy. That makes decoding
    faster on cores of their own, and much slower on cores that run something else too."""
    arena: bool = True
    """Whether memory for what operators pass on stays with the session. Without, it goes back to the system after each
    use, and batches of many tokens run slower."""
    optimization_level: Literal["none", "basic", "extended", "all"] = "all"
    """What ONNX Runtime may do to the graph when it opens it, in its own words. `basic` leaves out what is there for
    one provider alone, `none` everything: to find out whether a wrong result comes from there."""
    execution_provider: str = CPU
    """Which of the runtime's providers runs the graph, all of it: what has no kernel there is refused, and does not run
    on the CPU unseen. Others come with other builds of the runtime; nothing here was measured on them."""

    def unavailable(self) -> str | None:
        remedy = "pip install 'optkit[onnxruntime]'"
        for name in ("onnxruntime", "onnx", "onnx_ir", "onnxscript"):
            if importlib.util.find_spec(name) is None:
                return f"needs {name}; {remedy}"
        try:
            version = importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError:
            return None  # another build of the runtime, under a name of its own
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"needs onnxruntime {OLDEST[0]}.{OLDEST[1]} or later, found {version}; {remedy}"
        return self._no_provider()

    def _no_provider(self) -> str | None:
        if self.execution_provider == CPU:
            return None
        import onnxruntime

        found = onnxruntime.get_available_providers()
        if self.execution_provider in found:
            return None
        what = f"this build of onnxruntime has no execution provider {self.execution_provider!r}"
        return f"{what}, only {', '.join(found)}; choose one of them, or install the build that has it"

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        lowered = self._lowering(tags)
        if self.execution_provider == CPU:
            return lowered
        where = f" on {self.execution_provider}"
        return {tag: replace(found, kernel=found.kernel and found.kernel + where) for tag, found in lowered.items()}

    def _lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        exported = bool(tags & ONE_CALL)
        rounded = exported and any(tag.startswith("activations:int8-") for tag in tags)
        weights = self._integer_product if rounded else self._exported_weights if exported else self._weights
        lowered = {tag: weights(tag) for tag in sorted(tags) if tag.startswith("weights:")}
        activations = _activations if exported else self._activations
        lowered |= {tag: activations(tag) for tag in sorted(tags) if tag.startswith("activations:")}
        lowered |= {tag: _cache(tag) for tag in sorted(tags) if tag.startswith("kv:")}
        lowered |= other_task(tags)
        if IMAGE_CLASSIFICATION in tags:
            kernels = {INTEGER_PRODUCT: f"QLinearConv, ConvInteger, {INTEGER_PRODUCT}"}
            return {tag: replace(how, kernel=kernels.get(how.kernel, how.kernel)) for tag, how in lowered.items()}
        if exported:
            return lowered
        if self.streams > 1:
            lowered |= {CAUSAL_LM: _impossible("its decoders run one step at a time; leave streams at 1")}
        return lowered | {
            tag: _impossible(f"its graphs are of {', '.join(ARCHITECTURES)}")
            for tag in sorted(tags)
            if tag.startswith("arch:") and tag.removeprefix("arch:") not in ARCHITECTURES
        }

    def _integer_product(self, tag: str) -> Lowering:
        match = INTEGERS.fullmatch(tag)
        if tag == "weights:float":
            return self._weights(tag)
        if match is None or match[2] == "group":
            return _impossible("its integer products need int weights with one scale for each output channel")
        return Lowering(INTEGER_PRODUCT, native=True, tolerance=STATIC_TOLERANCE)

    def _exported_weights(self, tag: str) -> Lowering:
        if self.accuracy_level == 4 and tag in ("weights:int8-channel", "weights:int8-channel-asym"):
            reason = "rounds the input to int8 by the scale of each token; accuracy_level 1 keeps it float32"
            return Lowering(INTEGER_PRODUCT, native=True, tolerance=DYNAMIC_TOLERANCE, reason=reason)
        return self._weights(tag)

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

    def _activations(self, tag: str) -> Lowering:
        if tag != "activations:int8-dynamic":
            return _impossible("its decoders round activations to symmetric int8 as they come, and have no other way")
        if self.accuracy_level != 4:
            return _impossible("at accuracy_level 1 activations stay float32; set accuracy_level to 4")
        reason = f"rounded in blocks of {self.block_size} input features or fewer, finer than token by token"
        return Lowering("MatMulNBits (int8 activations)", native=True, tolerance=0.15, reason=reason)

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # The file is mapped, and its matrices are rearranged into a copy that the kernels read.
        return 2 * weight_bytes

    def compile(self, model: Model, directory: Path) -> None:
        how = {"accuracy_level": self.accuracy_level, "block_size": self.block_size}
        if model.tags & ONE_CALL:
            from optkit_backends.onnxruntime.export import compile_model

            compile_model(model, directory, **how)
        else:
            from optkit_backends.onnxruntime.graph import compile_module

            compile_module(model.module, directory, **how)

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession | TensorSession:
        from optkit import hardware
        from optkit_backends.onnxruntime.files import TensorFacts

        settings: dict[str, Any] = {
            "threads": self.threads or hardware.usable_cores(),
            "spin": self.spin,
            "arena": self.arena,
            "optimization": self.optimization_level,
            "provider": self.execution_provider,
        }
        if (runtime / TensorFacts.FILE).exists():
            from optkit_backends.onnxruntime.tensors import OnnxTensorSession

            return OnnxTensorSession(runtime, streams=self.streams, **settings)
        from optkit_backends.onnxruntime.session import OnnxSession

        return OnnxSession(runtime, limits, **settings)


def kernel_name(bits: int, accuracy_level: int) -> str:
    """How reports call MatMulNBits with these settings."""
    return f"MatMulNBits ({bits}-bit, {'int8' if accuracy_level == 4 else 'float32'} activations)"


def _activations(tag: str) -> Lowering:
    if tag == "activations:int8-dynamic":
        return Lowering(INTEGER_PRODUCT, native=True, tolerance=DYNAMIC_TOLERANCE)
    if not tag.startswith("activations:int8-static"):
        return _impossible("its integer products need int8 activations with a scale for each token, or one zero point")
    return Lowering(INTEGER_PRODUCT, native=True, tolerance=STATIC_TOLERANCE)


def _cache(tag: str) -> Lowering:
    if tag not in CACHES:
        return _impossible("its attention kernel for the CPU keeps float32 or int8")
    # Other sums round numbers next to a half to the other neighbour: SmolLM2-135M shows 0.006.
    return Lowering(f"GroupQueryAttention (int8 cache, {CACHES[tag]} scales)", native=True, tolerance=0.02)


def _impossible(reason: str) -> Lowering:
    return Lowering("", native=False, reason=reason)
