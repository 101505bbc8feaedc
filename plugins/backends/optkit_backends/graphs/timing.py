"""How long each kernel of a compiled graph takes, as torch's profiler sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import conv_flop_count

from optkit.steps import KernelTime

__all__ = ["Product", "Profiled", "products_of"]

_CONVOLUTIONS = ("aten::convolution", "aten::_convolution")
_ARGUMENTS = {"aten::linear": 3, "aten::convolution": 9, "aten::_convolution": 13}


Product = tuple[str, int, list[int]]
"""A linear layer or a convolution: its path, and the bytes and the shape of its weights."""


@dataclass(frozen=True, slots=True)
class Profiled:
    """How the profiler calls what a runtime runs."""

    kernels: tuple[str, ...]
    """Names of kernels begin so."""
    products: frozenset[str]
    """Linear layers and convolutions, whichever of them runs."""

    def times(self, run: Callable[[], object], products: Sequence[Product]) -> list[KernelTime]:
        """The kernels of one run, without those that others call.

        Args:
            run: runs the graph.
            products: its linear layers and convolutions in the order in which they were recorded. The graph itself has
                no names: each kernel gets that of the first left with such weights. All go unused where it runs others.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            run()
        events: Any = profiler.events()
        outer = [
            event
            for event in sorted(events, key=lambda event: event.time_range.start)
            if event.name.startswith(self.kernels)
            and (event.cpu_parent is None or not event.cpu_parent.name.startswith(self.kernels))
        ]
        seen = {id(event): _Seen.of(event) for event in outer if event.name in self.products}
        named = iter(_matched([*seen.values()], products))
        times = []
        for event in outer:
            one = seen.get(id(event))
            path, size = next(named, (event.name, 0)) if one else (event.name, 0)
            seconds = event.cpu_time_total / 1e6
            times.append(KernelTime(path, event.name, seconds, size, one.operations if one else 0))
        return times


def products_of(module: nn.Module, run: Callable[[], Sequence[Tensor]], *, needed: bool = False) -> list[Product]:
    """The linear layers and convolutions of a module, in the order in which `run` runs them.

    Args:
        run: gives what it computes.
        needed: without those that nothing of this depends on, which compilers leave out.
    """
    # Weights that a transform made in inference mode can take no part in autograd, which tells what is needed.
    needed = needed and not any(tensor.is_inference() for tensor in chain(module.parameters(), module.buffers()))
    found: list[Product] = []
    probes: list[Tensor] = []

    def note(path: str) -> Callable[[nn.Linear | _ConvNd, tuple[Tensor, ...], Tensor], Tensor]:
        def noted(layer: nn.Linear | _ConvNd, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
            found.append((path, layer.weight.nbytes, list(layer.weight.shape)))
            probes.append(torch.zeros((), dtype=output.dtype, requires_grad=needed))
            return output + probes[-1] if needed else output

        return noted

    hooks = [
        layer.register_forward_hook(note(path))
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | _ConvNd)
    ]
    try:
        with torch.set_grad_enabled(needed):
            outputs = [tensor.sum() for tensor in run() if tensor.requires_grad]
    finally:
        for hook in hooks:
            hook.remove()
    if not needed or not outputs:
        return found
    slopes = torch.autograd.grad(outputs, probes, allow_unused=True)
    return [one for one, slope in zip(found, slopes, strict=True) if slope is not None]


class _Seen(NamedTuple):
    """What the profiler saw of a product."""

    convolution: bool
    weights: list[int] | None
    """Their shape; None where it saw none."""
    operations: int
    """0 where it saw no shapes."""

    @classmethod
    def of(cls, event: Any) -> _Seen:
        # What is compiled ahead of time calls operators without telling shapes; that of a convolution calls another.
        event = next((child for child in event.cpu_children if child.name in _CONVOLUTIONS), event)
        # TorchScript's interpreter shows all that is on its stack: the arguments are the last.
        first = -_ARGUMENTS.get(event.name, 0)
        shapes: list[list[int]] = [shape for shape in event.input_shapes[first:] if len(shape) > 1]
        if len(shapes) < 2:
            return cls(False, None, 0)
        if event.name in _CONVOLUTIONS:
            # Inputs: input, weight, bias, stride, padding, dilation, transposed, output_padding, groups.
            options = event.concrete_inputs[first:][3:9]
            input, weight = (torch.empty(shape, device="meta") for shape in shapes[:2])
            output = torch.ops.aten.convolution(input, weight, None, *options)
            operations = conv_flop_count(shapes[0], shapes[1], [*output.shape], options[3])
            return cls(True, shapes[1], operations)
        # Those of `aten::linear` are `[out, in]`, of other products `[..., in, out]`.
        weights = shapes[1][-2:]
        outputs = weights[0 if event.name == "aten::linear" else 1]
        return cls(False, weights, 2 * math.prod(shapes[0]) * outputs)

    def may_be(self, product: Product) -> bool:
        """Whether what ran may be this layer."""
        shape = product[2]
        if self.convolution or len(shape) > 2:
            return self.convolution and self.weights == shape
        return self.weights is None or sorted(self.weights) == sorted(shape)


def _matched(seen: Sequence[_Seen], products: Sequence[Product]) -> list[tuple[str, int]]:
    """For all that ran the path and bytes of its layer; empty where not each has one."""
    left, found = list(products), []
    for one in seen:
        place = next((place for place, product in enumerate(left) if one.may_be(product)), None)
        if place is None:
            return []
        found.append(left.pop(place)[:2])
    return [] if left else found
