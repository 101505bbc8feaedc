"""How long each layer of a module takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from optkit.steps import KernelTime

__all__ = ["timed"]


@contextmanager
def timed(module: nn.Module, times: list[KernelTime], rest: str) -> Iterator[None]:
    """Note how long each layer of `module` takes that has no layers in it, and in the end what is left of the time.

    Args:
        module: is run once meanwhile, eagerly.
        times: gets an entry for each call.
        rest: what runs between these layers.
    """
    started: dict[nn.Module, float] = {}
    hooks = []
    for name, layer in module.named_modules():
        if next(layer.children(), None) is None:
            hooks.append(layer.register_forward_pre_hook(lambda layer, _: started.update({layer: time.perf_counter()})))
            hooks.append(layer.register_forward_hook(_recorder(name, started, times)))
    begin = time.perf_counter()
    try:
        yield
        whole = time.perf_counter() - begin
    finally:
        for hook in hooks:
            hook.remove()
    times.append(KernelTime(rest, "eager", max(whole - sum(entry.seconds for entry in times), 0.0)))


def _recorder(name: str, started: dict[nn.Module, float], times: list[KernelTime]) -> Any:
    def record(layer: nn.Module, inputs: Any, output: Any) -> None:
        seconds = time.perf_counter() - started.pop(layer)
        # Of a transposed convolution each number that comes in meets weights; of others each that goes out.
        met = inputs[0] if isinstance(layer, _ConvTransposeNd) else output
        times.append(KernelTime(name, type(layer).__name__, seconds, _bytes(layer), _operations(layer, met)))

    return record


def _bytes(layer: nn.Module) -> int:
    # An embedding reads only the rows that it looks up.
    return 0 if isinstance(layer, nn.Embedding) else sum(parameter.nbytes for parameter in layer.parameters())


def _operations(layer: nn.Module, met: Any) -> int:
    """Of the matrix product of a linear layer or a convolution."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(met, Tensor) or isinstance(layer, nn.Embedding):
        return 0
    return 2 * met.numel() * weight[0].numel() if weight.dim() > 1 else 0
