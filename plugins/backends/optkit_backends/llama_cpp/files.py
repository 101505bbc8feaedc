"""The files of a compiled model: the GGUF file, and what a session must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optkit_backends.recorded import Recorded

__all__ = ["MODEL", "Facts"]

MODEL = "model.gguf"


@dataclass(frozen=True, slots=True)
class Facts(Recorded):
    """What `open` needs besides the model."""

    FORMAT: ClassVar[int] = 1
    FILE: ClassVar[str] = "session.json"
    FILES: ClassVar[tuple[str, ...]] = (MODEL,)

    vocab_size: int
    kv_values_per_token: int
    """Numbers that all layers keep of a token."""
    max_length: int
    """Tokens of one sequence."""
    linears: dict[str, tuple[str, int]]
    """By the path of each linear layer, GGML's type of its weights and their bytes."""
