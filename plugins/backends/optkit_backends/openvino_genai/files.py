"""The files of a compiled decoder: OpenVINO's graph and weights, and what a session must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optkit_backends.recorded import Recorded

__all__ = ["GRAPH", "WEIGHTS", "DecoderFacts"]

# The names that openvino_genai looks for.
GRAPH, WEIGHTS = "openvino_model.xml", "openvino_model.bin"


@dataclass(frozen=True, slots=True)
class DecoderFacts(Recorded):
    """What `open` needs of a decoder besides the graph."""

    FORMAT: ClassVar[int] = 1
    FILE: ClassVar[str] = "session.json"
    FILES: ClassVar[tuple[str, ...]] = (GRAPH, WEIGHTS)

    openvino: str
    """The version that wrote the graph."""
    layers: list[tuple[int, int, int]]
    """Heads, numbers of a key and numbers of a value that each layer keeps of a token."""
    vocab_size: int
    longest: int | None
    """Tokens beyond which rotary angles would not be those of the graph."""
