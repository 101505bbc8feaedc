"""The `openvino_genai` backend: language models in OpenVINO GenAI's own continuous batching."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from optkit.backends import AnySession, Backend, Lowering
from optkit.model import Model, ModelCard
from optkit.steps import Limits
from optkit.weights import CAUSAL_LM
from optkit_backends.tasks import other_task

__all__ = ["OpenVINOGenAI"]

INTEGERS = re.compile(r"weights:int(\d)-(channel|group)(-asym)?")


class OpenVINOGenAI(Backend):
    """Continuous batching of OpenVINO GenAI on the CPU: the runtime itself decides who runs, over a paged KV cache.

    It takes no batching strategy, so the recipe names none; `max_batch_size` is an option here. Integer weights keep
    their very integers, in half a byte each up to 4 bits and in one above; activations and the KV cache stay float32.

    Requests are sampled with `temperature`, `top_k`, `top_p`, `repetition_penalty` and `seed`. Its `min_tokens` and its
    other penalties compute something else than optkit's, and it does not give away the likely tokens: requests that ask
    for `min_tokens`, `min_p`, `presence_penalty`, `frequency_penalty`, `logit_bias`, log probabilities or structured
    output are refused.

    Quality is measured on the compiled graph without its paged cache, since the runtime gives no logits; that loads the
    weights a second time, in `apply`, `eval` and `compare` alone.

    Document: https://openvinotoolkit.github.io/openvino.genai/docs/guides/model-preparation/
    """

    extra: ClassVar[str] = "openvino-genai"

    max_batch_size: int = Field(default=16, ge=1, le=4096)
    """Sequences that run at once; more wait."""
    threads: int | None = Field(default=None, ge=1)
    """Threads that run one step; by default the cores that this process may use."""

    @property
    def own_batch_size(self) -> int:
        return self.max_batch_size

    def unavailable(self) -> str | None:
        for name in ("openvino", "openvino_genai"):
            if importlib.util.find_spec(name) is None:
                return f"needs {name}; pip install 'optkit[openvino-genai]'"
        return None

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        lowered = {tag: _weights(tag) for tag in sorted(tags) if tag.startswith("weights:")}
        for tag in sorted(tag for tag in tags if tag.startswith("activations:")):
            lowered[tag] = _impossible("it multiplies float32 activations")
        for tag in sorted(tag for tag in tags if tag.startswith("kv:")):
            lowered[tag] = _impossible("its paged attention keeps keys and values as float32")
        return lowered | other_task(tags, {CAUSAL_LM}, "only causal language models run on it")

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        # While it is judged, the graph is open twice; each keeps a copy that its kernels read.
        return 4 * weight_bytes

    def compile(self, model: Model, directory: Path) -> None:
        from optkit_backends.openvino_genai.conversion import compile_decoder

        compile_decoder(model.module, directory)

    def open(self, runtime: Path, weights: Path, limits: Limits) -> AnySession:
        from optkit import hardware
        from optkit_backends.openvino_genai.session import OpenVINOGenAISession

        return OpenVINOGenAISession(runtime, limits, threads=self.threads or hardware.usable_cores())


def _weights(tag: str) -> Lowering:
    if tag == "weights:float":
        return Lowering("FullyConnected (float32)", native=True, tolerance=1e-4)
    match = INTEGERS.fullmatch(tag)
    if match is None:
        return _impossible("it has no kernel for this format")
    stored = "i4" if int(match[1]) <= 4 else "i8"
    return Lowering(f"FullyConnected ({stored} weights, float32 activations)", native=True, tolerance=1e-4)


def _impossible(reason: str) -> Lowering:
    return Lowering("", native=False, reason=reason)
