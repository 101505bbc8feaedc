"""How long each kernel of a compiled graph takes, as torch's profiler sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from optkit.steps import KernelTime

__all__ = ["Profiled"]


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


def _operations(event: Any) -> int:
    """Of `aten::linear`, of an input `[..., in]` and weights `[out, in]`; 0 where the profiler saw no shapes."""
    shapes = [shape for shape in event.input_shapes if len(shape) > 1]
    return 2 * math.prod(shapes[0]) * shapes[1][0] if len(shapes) > 1 else 0
