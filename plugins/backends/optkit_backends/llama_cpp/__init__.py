"""The `llama_cpp` backend: decoders as GGUF files, run by llama.cpp on the CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from optkit.backends import Backend, Lowering, TokenSession
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit.weights import CAUSAL_LM
from optkit_backends.llama_cpp.architectures import ARCHITECTURES
from optkit_backends.llama_cpp.formats import BLOCK, stored_as

__all__ = ["LlamaCpp"]

INTEGERS = re.compile(r"weights:int(\d)-(channel|group)(-asym)?")
OLDEST = (0, 3, 36)
# Keys and values are rounded to float16: SmolLM2-135M shows 3e-4 to 7e-4.
FLOAT_TOLERANCE = 3e-3
# Three times what SmolLM2-135M, whose activations have outliers, shows: 0.02 on prose, 0.045 on a short text.
TOLERANCE = 0.15
SHAPES = {
    "shape:pruned": "it gives all layers one shape",
    "pruned:rank": "its layers have one matrix, not two of low rank",
}


class LlamaCpp(Backend):
    """llama.cpp, with integer weights in its own blocks and its own kernels.

    Compiling writes one GGUF file, `model.gguf`, which is of use by itself: llama.cpp's tools, and the many programs
    over them, open it with its vocabulary and chat template. `optkit_backends.llama_cpp.export.export_gguf` writes the
    same from Python. Integers stay the very integers wherever GGUF has blocks for them: all symmetric ones, and
    asymmetric ones of 4 bits or less, in groups of 32 input features or a multiple, or by channel. Their scales are
    rounded to float16, as in every GGUF file. Layers in floating point stay float32.

    The session keeps its KV cache in float16, one slot for each sequence.

    Document: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    extra: ClassVar[str] = "llama-cpp"

    threads: int | None = Field(default=None, ge=1)
    """Threads that run one step; by default the cores that this process may use."""

    def unavailable(self) -> str | None:
        remedy = "pip install 'optkit[llama-cpp]'"
        if importlib.util.find_spec("llama_cpp") is None:
            return f"needs llama-cpp-python; {remedy}"
        version = importlib.metadata.version("llama-cpp-python")
        if tuple(int(part) for part in version.split(".")[:3]) < OLDEST:
            return f"needs llama-cpp-python {'.'.join(map(str, OLDEST))} or later, found {version}; {remedy}"
        return None

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        lowered = {tag: _weights(tag) for tag in sorted(tags) if tag.startswith("weights:")}
        rounding = all(how.native for tag, how in lowered.items() if tag != "weights:float")
        lowered |= {tag: _activations(tag, rounding) for tag in sorted(tags) if tag.startswith("activations:")}
        lowered |= {
            tag: _impossible("it keeps keys and values as float16, or in blocks that calibration knows nothing of")
            for tag in sorted(tags)
            if tag.startswith("kv:")
        }
        lowered |= {tag: _impossible(reason) for tag, reason in SHAPES.items() if tag in tags}
        lowered |= {
            tag: _impossible("only causal language models run on it")
            for tag in sorted(tags)
            if tag.startswith("task:") and tag != CAUSAL_LM
        }
        return lowered | {
            tag: _impossible(f"its GGUF export knows {', '.join(ARCHITECTURES)}")
            for tag in sorted(tags)
            if tag.startswith("arch:") and tag.removeprefix("arch:") not in ARCHITECTURES
        }

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # The file is mapped, and blocks of 4 bits are rearranged into a copy that the kernels read.
        return 2 * weight_bytes

    def compile(self, model: Model, directory: Path) -> None:
        from optkit_backends.llama_cpp.export import export_gguf
        from optkit_backends.llama_cpp.files import MODEL

        export_gguf(model, directory / MODEL).write(directory)

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession:
        from optkit import hardware
        from optkit_backends.llama_cpp.session import LlamaCppSession

        return LlamaCppSession(runtime, limits, threads=self.threads or hardware.usable_cores())


def _weights(tag: str) -> Lowering:
    match = INTEGERS.fullmatch(tag)
    if tag == "weights:float":
        return Lowering("MUL_MAT (F32 weights)", native=True, tolerance=FLOAT_TOLERANCE)
    if match is None and not tag.startswith("weights:fp8"):
        return _impossible("its GGUF export reads integers, fp8 and floats")
    blocks = None if match is None else stored_as(int(match[1]), match[3] is None)
    if blocks is None:
        reason = "dequantized to float32 when compiled: GGUF has no blocks that hold these weights as they are"
        return Lowering("MUL_MAT (F32 weights)", native=False, tolerance=FLOAT_TOLERANCE, reason=reason)
    reason = f"scales are rounded to float16, and activations to 8 bits in blocks of {BLOCK} input features"
    return Lowering(f"MUL_MAT ({blocks} weights)", native=True, tolerance=TOLERANCE, reason=reason)


def _activations(tag: str, rounding: bool) -> Lowering:
    if tag != "activations:int8-dynamic":
        return _impossible("it rounds activations to symmetric int8 as they come, and has no other way")
    if not rounding:
        return _impossible("it rounds activations only where it multiplies integers, and these weights become floats")
    reason = f"rounded in blocks of {BLOCK} input features, finer than token by token"
    return Lowering("MUL_MAT (Q8 activations)", native=True, tolerance=TOLERANCE, reason=reason)


def _impossible(reason: str) -> Lowering:
    return Lowering("", native=False, reason=reason)
