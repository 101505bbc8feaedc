"""A model's structures: what of which layers goes with a unit of a pool, what it costs, and the model without some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from optkit.blockwise import output_of
from optkit_prune.structured.pools import Cost, Pool, Term

__all__ = ["Cut", "Side", "Structure", "cost_of", "head_size", "masked", "tensors_of"]

Side = Literal["in", "out", "both", "parameter"]
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Cut:
    """A layer, or a parameter outside any known layer, of which entries go with the units of a pool.

    Attributes:
        path: in the model.
        side: of the layer; `both` where one vector of it serves input and output.
        places: of the pool's entries along that side, `[entries]` int64; others may be another pool's.
        units: the unit that each of them goes with, `[entries]` int64.
        remove: takes entries out of that side, by their places.
        axis: of a parameter.
    """

    path: str
    side: Side
    places: Tensor
    units: Tensor
    remove: Callable[[list[int]], object]
    axis: int = -1


@dataclass(frozen=True, slots=True)
class Structure:
    """A pool of a model, and all that goes with its units."""

    pool: Pool
    cuts: tuple[Cut, ...]

    @property
    def readers(self) -> tuple[Cut, ...]:
        """The layers that read the units: with these inputs at zero, a unit is as good as gone."""
        return tuple(cut for cut in self.cuts if cut.side == "in")


def head_size(attention: nn.Module) -> int:
    """Features of a head, as the attention says; 0 if it does not."""
    module: Any = attention
    size: int = getattr(module, "head_dim", 0) or getattr(module, "attention_head_size", 0)
    return size


def tensors_of(module: nn.Module, cut: Cut) -> dict[str, int]:
    """Paths of the parameters of which a cut takes entries, with the axis along which they lie."""
    if cut.side == "parameter":
        return {cut.path: cut.axis}
    layer: Any = module.get_submodule(cut.path)
    match layer:
        case nn.Linear() | _ConvNd():
            inside = (cut.side == "in") != getattr(layer, "transposed", False)
            axes = {"weight": 1} if inside else {"weight": 0}
            axes |= {} if cut.side == "in" else {"bias": 0}
        case nn.Embedding():
            axes = {"weight": 1}
        case _:
            axes = {"weight": -1, "bias": -1}
    return {f"{cut.path}.{name}": axis for name, axis in axes.items() if getattr(layer, name, None) is not None}


def cost_of(module: nn.Module, structures: Iterable[Structure], example: Batch, *, flops: bool) -> Cost:
    """The parameters of a model, or the multiplications of its linear layers and convolutions for a batch."""
    runs = _runs(module, example) if flops else {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    named = dict(module.named_parameters())
    axes: dict[nn.Parameter, list[tuple[tuple[Pool, int], ...]]] = {
        value: [()] * value.dim() for value in parameters.values()
    }
    for structure in structures:
        for cut in structure.cuts:
            for name, axis in tensors_of(module, cut).items():
                if name in named:  # a tied tensor has cuts under both of its names
                    axes[named[name]][axis] += ((structure.pool, len(cut.places)),)
    terms = [Term(tuple(value.shape), tuple(axes[value]), runs.get(name, 0.0)) for name, value in named.items()]
    if flops:
        # A tied head multiplies, though its weights are the embedding's.
        shared = parameters.keys() - named.keys()
        terms += [Term(tuple(parameters[n].shape), tuple(axes[parameters[n]]), runs.get(n, 0.0)) for n in shared]
    return Cost(terms, flops)


def _runs(module: nn.Module, example: Batch) -> dict[str, float]:
    """How often each weight of a linear layer or convolution is multiplied in a run, by its path."""
    runs: dict[str, float] = {}
    with torch.no_grad(), _hooks() as hooks:
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | _ConvNd):

                def count(layer: Any, args: Any, output: Tensor, name: str = f"{path}.weight") -> None:
                    places = args[0] if getattr(layer, "transposed", False) else output
                    runs[name] = runs.get(name, 0.0) + places.numel() / layer.weight.shape[0]

                hooks.append(layer.register_forward_hook(count))
        output_of(module, example)
    return runs


@contextmanager
def masked(module: nn.Module, structures: Iterable[Structure], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """With the inputs of all readers multiplied by a factor for each unit.

    Args:
        module: the model.
        structures: of it.
        masks: by pool, `[units]` float.
    """
    with _hooks() as hooks:
        for structure in structures:
            for reader in structure.readers:

                def multiply(
                    layer: nn.Module, args: tuple[Any, ...], reader: Cut = reader, key: str = structure.pool.key
                ) -> tuple[Any, ...]:
                    mask, axis = masks[key], (1 if isinstance(layer, _ConvNd) else -1)
                    ones = mask.new_ones(args[0].shape[axis])
                    factors = ones.index_copy(0, reader.places.to(mask.device), mask[reader.units.to(mask.device)])
                    if axis == 1:
                        factors = factors.reshape(-1, *[1] * (args[0].dim() - 2))
                    return (args[0] * factors, *args[1:])

                hooks.append(module.get_submodule(reader.path).register_forward_pre_hook(multiply))
        yield


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    hooks: list[Any] = []
    try:
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()
