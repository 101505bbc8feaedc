"""How long a model takes, in proportion to another one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optkit.blockwise import output_of

__all__ = ["time_ratio"]

_ROUNDS = 7
_BATCHES = 4


def time_ratio(module: nn.Module, original: nn.Module, batches: Sequence[Mapping[str, Tensor]], device: str) -> float:
    """The median over rounds of a model's time on some batches, divided by that of the original.

    Both run in turns, and which comes first changes, so that what else the machine does concerns both.

    Args:
        module: is moved to the device, and back to the CPU.
        original: likewise.
        batches: of which four, at even distances, are run in each round.
        device: to run on.
    """
    count = min(_BATCHES, len(batches))
    chosen = [batches[place * len(batches) // count] for place in range(count)]
    moved = [{name: value.to(device) for name, value in batch.items()} for batch in chosen]
    pair = (module.to(device), original.to(device))
    try:
        for model in pair:
            _seconds(model, moved, device)  # the first run allocates
        ratios: list[float] = []
        for index in range(_ROUNDS):
            first = index % 2
            taken = {place: _seconds(pair[place], moved, device) for place in (first, 1 - first)}
            ratios.append(taken[0] / taken[1])
    finally:
        for model in pair:
            model.to("cpu")
    return statistics.median(ratios)


def _seconds(module: nn.Module, batches: Sequence[Mapping[str, Tensor]], device: str) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            output_of(module, batch)
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
