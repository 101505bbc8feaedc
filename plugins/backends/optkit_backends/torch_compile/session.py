"""A decoder, compiled in this process, as a session: keys and values in paged blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from optkit.steps import Limits
from optkit.weights import load_folder
from optkit_backends.graphs.decoder import OTHER_SIZES, DecoderGraph
from optkit_backends.graphs.session import GraphSession
from optkit_backends.graphs.timing import Profiled
from optkit_backends.torch_compile.compiling import compiled

__all__ = ["PROFILED", "TorchCompileSession"]

PROFILED = Profiled(("aten::", "graph_"), frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::convolution"}))
"""What torch's profiler calls what runs. An input whose rows do not lie one behind another, as attention gives it, is
multiplied as a batch of one."""


class TorchCompileSession(GraphSession):
    """Runs the model of a weights folder; see `optkit.backends.TokenSession`.

    Raises:
        RecipeError: its attention is none that can be paged, it cannot be compiled, or sequences of
            `limits.max_length` are longer than its rotary angles hold for.
    """

    PROFILED: ClassVar[Profiled] = PROFILED

    def __init__(self, weights: Path, limits: Limits) -> None:
        graph = DecoderGraph.of(load_folder(weights).module)
        graph.paged.check(limits.max_length, weights)
        others = (graph.inputs(sizes) for sizes in OTHER_SIZES)
        self._compiled: Any = compiled(graph.step, graph.inputs(), graph.dynamic(), others, graph.name)
        super().__init__(limits, graph.paged.layers, graph.windows, graph.products(), graph.vocab_size)

    def _call(self, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self._compiled(*inputs)[0]
        return logits

    def close(self) -> None:
        self._compiled = None
        super().close()
