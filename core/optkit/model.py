"""The model that flows through a recipe, and what is known of it before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Model", "ModelCard"]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model's facts, read from headers in well under a second and without torch. Planning works on this alone."""

    name: str
    tags: frozenset[str]
    """For example `task:causal-lm`, `task:feature-extraction` or `task:image-classification`, `arch:llama`,
    `weights:float`."""
    linears: Mapping[str, tuple[int, int]]
    """`[out_features, in_features]` of every linear layer, by module path, the output head included."""
    parameters: int
    """Parameters in all; a tied head counts once."""
    bytes_per_parameter: int
    """Of the weights once loaded."""
    vocab_size: int
    hidden_size: int
    layers: int
    max_length: int
    """Positions that the model was trained for; 1 for an image classifier."""
    kv_values_per_token: int
    """Numbers in the KV cache per token, keys and values of all layers; 0 where there is none."""
    tied_head: bool
    """Whether the output head and the input embedding are one tensor."""
    head_size: int = 0
    """Features of an attention head; 0 where it is not known."""
    convolutions: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)
    """`[out_channels, in_channels / groups, height, width]` of every convolution of two axes, by module path."""
    pixels: tuple[int, int, int] | None = None
    """Of an image classifier about `[channels, height, width]` of what it reads; its image processor knows."""
    labels: tuple[str, ...] = ()
    """Of an image classifier the names of its classes, in the order of its logits."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model with its tokenizer and the tags that say what was done to it."""

    module: torch.nn.Module
    """In evaluation mode, on the CPU, without gradients; a transformers model has its `config`."""
    tokenizer: Any
    """The transformers tokenizer, or None."""
    tags: frozenset[str]
    files: Mapping[str, str] = field(default_factory=dict)
    """Small text files that belong to it and that its configuration does not hold, by path: those of
    sentence-transformers, or of the image processor. They stay beside its weights."""

    def tagged(self, *tags: str) -> Model:
        """The same model with further tags."""
        return replace(self, tags=self.tags | frozenset(tags))
