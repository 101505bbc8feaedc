"""A model of one call, compiled in this process, as a session: encoders, vision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from optkit_backends.graphs.session import GraphTensorSession
from optkit_backends.graphs.tensors import TensorGraph
from optkit_backends.graphs.timing import Profiled
from optkit_backends.torch_compile.compiling import compiled
from optkit_backends.torch_compile.session import PROFILED

__all__ = ["TorchCompileTensorSession"]


class TorchCompileTensorSession(GraphTensorSession):
    """Runs a `TensorGraph`: that of an encoder, or of any other module; see `optkit.backends.TensorSession`.

    Raises:
        RecipeError: it cannot be compiled.
    """

    PROFILED: ClassVar[Profiled] = PROFILED

    def __init__(self, graph: TensorGraph) -> None:
        facts, others = graph.facts(), [graph.inputs(2), graph.least()]
        self._compiled: Any = compiled(graph.module, graph.inputs(), graph.dynamic(), others, graph.name)
        super().__init__(facts["inputs"], facts["outputs"], facts["products"])

    def _call(self, inputs: tuple[Tensor, ...]) -> Sequence[Tensor]:
        with torch.inference_mode():
            found: Sequence[Tensor] = self._compiled(*inputs)
        return found

    def close(self) -> None:
        self._compiled = None
