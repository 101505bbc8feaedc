"""How weights, activations and KV caches are stored, in the words of compressed-tensors; known without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = [
    "BFLOAT16_CACHE",
    "CACHE_ENTRY",
    "FP8_MAX",
    "SHAPES_ENTRY",
    "ActivationScheme",
    "CacheScheme",
    "WeightScheme",
]

FP8_MAX = 448.0
"""The largest E4M3 number (Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433)."""
SHAPES_ENTRY = "optkit_shapes"
"""The entry of a `config.json` that says which layers have other shapes than the rest of it gives."""
CACHE_ENTRY = "optkit_kv_cache"
"""The entry of a `config.json` that says how a cache without scales keeps keys and values, for which compressed-tensors
has no words."""
Granularity = Literal["channel", "group"]


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of one layer are stored."""

    bits: int
    """2 to 8."""
    group_size: int | None
    """Input features that share a scale; None: one scale for each output channel."""
    symmetric: bool
    type: Literal["int", "float"] = "int"
    """`float`: E4M3, 8 bits, symmetric."""

    @property
    def granularity(self) -> Granularity:
        return "channel" if self.group_size is None else "group"

    @property
    def range(self) -> tuple[int, int]:
        """Smallest and largest stored integer."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in memory."""
        import torch

        return torch.int8 if self.type == "int" else torch.float8_e4m3fn

    @property
    def tag(self) -> str:
        """The `weights:*` tag of this format: `weights:int4-group`, `weights:fp8-channel`; asymmetric ones end in
        `-asym`."""
        name = f"int{self.bits}" if self.type == "int" else f"fp{self.bits}"
        return f"weights:{name}-{self.granularity}" + ("" if self.symmetric else "-asym")


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """How a layer rounds its input before the product. 8 bits always."""

    dynamic: bool
    """Whether every token gets a scale of its own when it comes; else one scale, found by calibration, serves all."""
    symmetric: bool = True
    type: Literal["int", "float"] = "int"
    """`float`: E4M3, symmetric."""

    @property
    def tag(self) -> str:
        """The `activations:*` tag of this format: `activations:int8-dynamic`, `activations:fp8-static`; asymmetric
        ones end in `-asym`."""
        when = "dynamic" if self.dynamic else "static"
        return f"activations:{'int8' if self.type == 'int' else 'fp8'}-{when}" + ("" if self.symmetric else "-asym")


@dataclass(frozen=True, slots=True)
class CacheScheme:
    """How a KV cache keeps keys and values: in 8 bits, symmetric, with scales that calibration found, or bfloat16."""

    type: Literal["int", "float", "bfloat16"] = "int"
    """`float`: E4M3."""
    granularity: Literal["head", "tensor"] | None = "head"
    """What shares a scale in a layer: the keys, or values, of one head, or of all heads. None of bfloat16, which has no
    scales."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what is kept."""
        import torch

        return {"int": torch.int8, "float": torch.float8_e4m3fn, "bfloat16": torch.bfloat16}[self.type]

    @property
    def tag(self) -> str:
        """The `kv:*` tag of this format: `kv:int8-head`, `kv:fp8-tensor`, `kv:bfloat16`."""
        if self.granularity is None:
            return f"kv:{self.type}"
        return f"kv:{'int8' if self.type == 'int' else 'fp8'}-{self.granularity}"


BFLOAT16_CACHE = CacheScheme("bfloat16", None)
"""The only one without scales."""
