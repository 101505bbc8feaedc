"""What a walk keeps of finished blocks, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor, nn

from optkit.quantized import (
    ActivationScheme,
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    WeightScheme,
    replace_module,
)
from optkit.shapes import LowRankLinear, reshape
from optkit.transforms import TransformContext

__all__ = ["keep", "resumed"]


def keep(block: nn.Module, index: int, hidden: Sequence[Tensor], context: TransformContext) -> None:
    """Keep a finished block, and the inputs of the next one, `[batch]`."""
    layers = {
        path: {"scheme": asdict(layer.scheme), "activations": layer.activations and asdict(layer.activations)}
        for path, layer in block.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    ranks = {path: layer.rank for path, layer in block.named_modules() if isinstance(layer, LowRankLinear)}
    context.checkpoint.save(f"block-{index}", block.state_dict(), {"layers": layers, "ranks": ranks})
    # Last: it says that this block is whole.
    context.checkpoint.save("hidden", {str(i): value for i, value in enumerate(hidden)}, {"finished": index + 1})


def resumed(
    blocks: Mapping[str, nn.Module], hidden: list[Tensor], context: TransformContext
) -> tuple[int, list[Tensor]]:
    """How many blocks the checkpoint holds, and the inputs of the next one."""
    found = context.checkpoint.load("hidden")
    if found is None:
        return 0, hidden
    tensors, facts = found
    for index, block in enumerate(list(blocks.values())[: facts["finished"]]):
        kept = context.checkpoint.load(f"block-{index}")
        if kept is None:
            return 0, hidden
        _restore(block, *kept)
    return facts["finished"], [tensors[str(i)] for i in range(len(hidden))]


def _restore(block: nn.Module, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    factored = {path for path, part in block.named_modules() if isinstance(part, LowRankLinear)}
    reshape(block, {path: {"rank": rank} for path, rank in facts["ranks"].items() if path not in factored})
    for path, described in facts["layers"].items():
        parts: dict[str, Any] = {
            name: tensors.pop(f"{path}.{name}", None)
            for name in ("weight", "scale", "zero_point", "bias", "input_scale", "input_zero_point")
        }
        activations = described["activations"] and ActivationScheme(**described["activations"])
        held: Any = block.get_submodule(path)
        made = partial(QuantizedConv2d, held) if isinstance(held, nn.Conv2d) else QuantizedLinear
        replace_module(block, path, made(**parts, scheme=WeightScheme(**described["scheme"]), activations=activations))
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        owner = block.get_submodule(path)
        held = getattr(owner, name, None)
        if isinstance(held, nn.Parameter) and held.is_meta:
            setattr(owner, name, nn.Parameter(tensor, requires_grad=False))
        elif isinstance(held, nn.Parameter):
            held.data = tensor
        else:
            owner.register_buffer(name, tensor)
