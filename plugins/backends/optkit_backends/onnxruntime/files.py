"""The files of a compiled model: the graph, its weights beside it, and what a session must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from optkit_backends.recorded import Recorded

__all__ = ["GRAPH", "WEIGHTS", "Facts", "TensorFacts"]

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"


class _Recorded(Recorded):
    FORMAT: ClassVar[int] = 2
    FILES: ClassVar[tuple[str, ...]] = (GRAPH, WEIGHTS)


@dataclass(frozen=True, slots=True)
class Facts(_Recorded):
    """What `open` needs of a decoder besides the graph."""

    FILE: ClassVar[str] = "session.json"

    kv_heads: list[int]
    """Of each layer."""
    head_dim: int
    vocab_size: int
    max_length: int
    """Positions in the table of rotary angles."""
    cache_dtype: Literal["float32", "int8"] = "float32"
    """Of keys and values."""


@dataclass(frozen=True, slots=True)
class TensorFacts(_Recorded):
    """What `open` needs of any other model besides the graph."""

    FILE: ClassVar[str] = "tensors.json"

    inputs: list[str]
    outputs: list[str]
