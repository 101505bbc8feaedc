"""Weights rounded to nearest, for quantizers that decide something else: activations, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optkit.model import Model
from optkit.transforms import TransformContext
from optkit_quantize.quantizer import Quantizer, install
from optkit_quantize.rounding import round_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from optkit_quantize.observers import Observer

__all__ = ["round_calibrated", "round_to_nearest"]


def round_to_nearest(quantizer: Quantizer, model: Model, context: TransformContext) -> Model:
    """Round the chosen layers without data.

    Raises:
        OptkitError: a weight is not finite.
    """
    names = list(quantizer.chosen(model.module))  # and not the layers, so that each is freed as it goes
    for done, name in enumerate(names):
        context.progress(done, len(names), name)
        layer: Any = model.module.get_submodule(name)
        rounded = round_weight(layer.weight, quantizer.scheme, name=name)
        install(model, name, quantizer.quantized(layer, *rounded))
    context.progress(len(names), len(names), "done")
    return model.tagged(*quantizer.provides())


def round_calibrated(
    quantizer: Quantizer, model: Model, context: TransformContext, observer: Callable[[], Observer]
) -> Model:
    """Round the chosen layers, block by block, each with one input scale from what it gets of the blocks before it.

    Args:
        quantizer: of static activations.
        model: changed in place.
        context: with calibration data.
        observer: makes one for each layer.

    Raises:
        OptkitError: a weight or an input is not finite, or a layer gets no input.
    """
    from optkit.blockwise import walk
    from optkit_quantize.observers import input_scales

    assert quantizer.activation_scheme is not None
    for block in walk(model.module, context, list(quantizer.chosen(model.module))):
        scales = input_scales(block, quantizer.activation_scheme, observer)
        for name in block.names:
            layer: Any = model.module.get_submodule(name)
            rounded = round_weight(layer.weight.flatten(1), quantizer.scheme, name=name)
            install(model, name, quantizer.quantized(layer, *rounded, *scales[name]))
    return model.tagged(*quantizer.provides())
