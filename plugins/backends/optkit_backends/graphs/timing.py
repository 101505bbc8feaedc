"""How long each kernel of a compiled graph takes, as torch's profiler sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from optkit.steps import KernelTime

__all__ = ["Profiled", "linears_of"]


@dataclass(frozen=True, slots=True)
class Profiled:
    """How the profiler calls what a runtime runs."""

    kernels: tuple[str, ...]
    """Names of kernels begin so."""
    linears: frozenset[str]
    """Linear layers, whichever of them runs."""

    def times(self, run: Callable[[], object], paths: Sequence[tuple[str, int]]) -> list[KernelTime]:
        """The kernels of one run, without those that others call.

        Args:
            run: runs the graph.
            paths: of its linear layers, with the bytes of their weights, in the order in which they were recorded. The
                graph itself has none; they go unused where it runs another number of them.
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
        known = sum(event.name in self.linears for event in outer) == len(paths)
        named = iter(paths if known else ())
        times = []
        for event in outer:
            linear = event.name in self.linears
            path, size = next(named, ("", 0)) if linear else ("", 0)
            seconds = event.cpu_time_total / 1e6
            times.append(KernelTime(path or event.name, event.name, seconds, size, _operations(event) if linear else 0))
        return times


def linears_of(
    module: nn.Module, run: Callable[[], Sequence[Tensor]], *, needed: bool = False
) -> list[tuple[str, int]]:
    """Paths of the linear layers of a module and bytes of their weights, in the order in which `run` runs them.

    Args:
        run: gives what it computes.
        needed: without those that nothing of this depends on, which compilers leave out.
    """
    # Weights that a transform made in inference mode can take no part in autograd, which tells what is needed.
    needed = needed and not any(tensor.is_inference() for tensor in chain(module.parameters(), module.buffers()))
    found: list[tuple[str, int]] = []
    probes: list[Tensor] = []

    def note(path: str) -> Callable[[nn.Linear, tuple[Tensor, ...], Tensor], Tensor]:
        def noted(layer: nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
            found.append((path, layer.weight.nbytes))
            probes.append(torch.zeros((), dtype=output.dtype, requires_grad=needed))
            return output + probes[-1] if needed else output

        return noted

    hooks = [
        layer.register_forward_hook(note(path))
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
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


def _operations(event: Any) -> int:
    """Of an input `[..., in]` and weights: those of `aten::linear` are `[out, in]`, of other products `[..., in, out]`.
    0 where the profiler saw no shapes.
    """
    shapes: list[list[int]] = [shape for shape in event.input_shapes if len(shape) > 1]
    if len(shapes) < 2:
        return 0
    return 2 * math.prod(shapes[0]) * shapes[1][-2 if event.name == "aten::linear" else -1]
