"""What layers would become in each of several schemes, for choosing among them by what the model then predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optkit.blockwise import walk
from optkit.hessians import Hessians
from optkit.quantized import dequantize
from optkit.transforms import TransformContext
from optkit_quantize.gptq import gptq_round
from optkit_quantize.rounding import round_weight

if TYPE_CHECKING:
    from optkit.schemes import WeightScheme

__all__ = ["Rounding", "by_gptq", "gptq_rounded", "to_nearest"]

Rounding = Callable[[str, "WeightScheme"], Tensor]
"""`rounding(name, scheme)`: the float weight `[out, in]` that a layer would have."""


def to_nearest(module: nn.Module) -> Rounding:
    """Each weight rounded to nearest."""

    def rounding(name: str, scheme: WeightScheme) -> Tensor:
        layer: Any = module.get_submodule(name)
        return dequantize(*round_weight(layer.weight, scheme, name=name))

    return rounding


def by_gptq(
    module: nn.Module,
    names: Sequence[str],
    schemes: Sequence[WeightScheme],
    context: TransformContext,
    *,
    keep_zeros: bool,
) -> Rounding:
    """Each layer rounded by GPTQ with the inputs that it has in the unquantized model.

    Runs the model on the calibration data and rounds every layer once for each scheme. The integers of all of them are
    held in memory, a byte a weight and scheme, and each finished block's are kept in the checkpoint.

    Args:
        module: unquantized; stays as it is.
        names: paths of linear layers.
        schemes: each layer is rounded in each of them.
        context: calibration data, device, checkpoint, progress.
        keep_zeros: weights that are 0 stay 0.
    """
    exact = replace(context, checkpoint=context.checkpoint.within("candidates"))
    found: dict[str, dict[str, Tensor]] = {}
    for block in walk(module, exact, names, changed=False):
        hessians = Hessians()
        block.watch(block.names, hessians.see)
        for sharing in hessians.sharing(block.names):
            hessian = hessians.of(sharing[0])
            for place, scheme in enumerate(schemes):
                rounded = gptq_rounded(module, sharing, hessian, scheme, keep_zeros=keep_zeros)
                for name, parts in rounded.items():
                    held = {f"{part}-{place}": tensor.cpu() for part, tensor in parts.items()}
                    found[name] = found.get(name, {}) | held
        for name in block.names:
            exact.checkpoint.save(f"rounded-{name}", found[name])
    for name in names:
        if name not in found:  # its block was finished by a run that was killed
            kept = exact.checkpoint.load(f"rounded-{name}")
            assert kept is not None
            found[name] = kept[0]

    def rounding(name: str, scheme: WeightScheme) -> Tensor:
        place, parts = schemes.index(scheme), found[name]
        return dequantize(parts[f"weight-{place}"], parts[f"scale-{place}"], parts.get(f"zero_point-{place}"))

    return rounding


def gptq_rounded(
    module: nn.Module, names: Sequence[str], hessian: Tensor, scheme: WeightScheme, *, keep_zeros: bool
) -> dict[str, dict[str, Tensor]]:
    """Layers that share a Hessian, rounded as one, because rows do not depend on each other.

    Returns:
        By name: `weight`, `scale` and, where the scheme has them, `zero_point`, as `gptq_round` gives them.
    """
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    weight = torch.cat([layer.weight.detach() for layer in layers.values()])
    parts = dict(
        zip(
            ("weight", "scale", "zero_point"),
            gptq_round(weight, hessian, scheme, keep_zeros=keep_zeros, name=names[0]),
            strict=True,
        )
    )
    rows = [layer.out_features for layer in layers.values()]
    split = {part: torch.split(tensor, rows) for part, tensor in parts.items() if tensor is not None}
    return {name: {part: tensors[i].clone() for part, tensors in split.items()} for i, name in enumerate(layers)}
