"""The files of a compiled model: the graph, its weights beside it, and what a session must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optkit_backends.recorded import Recorded

__all__ = ["GRAPH", "TensorFacts"]

GRAPH = "model.xml"
WEIGHTS = "model.bin"


@dataclass(frozen=True, slots=True)
class TensorFacts(Recorded):
    """What `open` needs besides the graph."""

    FORMAT: ClassVar[int] = 1
    FILE: ClassVar[str] = "tensors.json"
    FILES: ClassVar[tuple[str, ...]] = (GRAPH, WEIGHTS)

    openvino: str
    """The version that wrote the graph."""
    root: str
    """What names in the graph begin with: the path of the module that was compiled."""
    inputs: list[str]
    outputs: list[str]
