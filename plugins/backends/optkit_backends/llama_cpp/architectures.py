"""The architectures that are exported: what GGUF calls them, and what llama.cpp makes of their tensors."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of GGUF."""

    name: str
    """As `general.architecture` has it."""
    neighbours: bool
    """Whether rotary angles turn neighbouring numbers of a head. transformers turns the two halves of a head, so that
    the rows of query and key change places."""
    biases: frozenset[str]
    """The linear layers of a decoder layer that may have one."""
    rope_factors: bool
    """Whether each frequency of the rotary angles may have a factor of its own, as Llama 3 has."""


_ATTENTION = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_ALL = _ATTENTION | {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
_LLAMA = Architecture("llama", neighbours=True, biases=_ALL, rope_factors=True)

ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", neighbours=False, biases=_ATTENTION, rope_factors=False),
    "qwen3": Architecture("qwen3", neighbours=False, biases=_ATTENTION, rope_factors=False),
}
"""By `model_type` of transformers."""
