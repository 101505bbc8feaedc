"""Models of one call, and any other module of one, as functions of tensors by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.model import Model
from optkit_backends.graphs.timing import products_of
from optkit_backends.positional import Positional, call_of, outputs_of, shallow_copy
from optkit_backends.torch.dense import make_dense

__all__ = ["Described", "TensorGraph"]

Described = dict[str, tuple[str, list[int | None]]]
"""Tensors by name: dtype, and sizes; None where any is taken."""


@dataclass(frozen=True, slots=True)
class TensorGraph:
    """A module of one call as a compiler of graphs takes it."""

    name: str
    """Of its class, for errors."""
    inner: nn.Module
    """A copy of it, which `module` calls."""
    module: nn.Module
    """In evaluation mode; called with the tensors of `example` by position, it gives a tuple of those of `outputs`."""
    example: Mapping[str, Tensor]
    outputs: list[str]
    sizes: Mapping[str, Sequence[int]]
    """The axes of each input whose size may change."""

    @classmethod
    def of_model(cls, model: Model) -> Self:
        """A transformers model that answers in one call, which stays as it is; see `call_of`."""
        call, inner = call_of(model), shallow_copy(model.module)
        return cls._of(inner, call.around(inner), call.example, list(call.outputs), call.dynamic)

    @classmethod
    def of(
        cls, module: nn.Module, example: Mapping[str, Tensor], dynamic: Mapping[str, Sequence[int]] | None = None
    ) -> Self:
        """Any module in evaluation mode, which stays as it is.

        Args:
            module: returns a tensor, which becomes the output `output`, or a mapping or tuple of tensors.
            example: what it can be called with, by name: these become the inputs, in this order.
            dynamic: the axes of each input whose size may change; by default the first, which is the batch.

        Raises:
            RecipeError: it gives no tensors.
        """
        with torch.inference_mode():
            outputs = list(outputs_of(module(**example)))
        if not outputs:
            name = type(module).__name__
            raise RecipeError("gives no tensors", where=name, remedy="let it return a tensor, or several")
        inner = shallow_copy(module)
        return cls._of(inner, inner, example, outputs, dynamic or dict.fromkeys(example, (0,)))

    @classmethod
    def _of(
        cls,
        inner: nn.Module,
        module: nn.Module,
        example: Mapping[str, Tensor],
        outputs: list[str],
        sizes: Mapping[str, Sequence[int]],
    ) -> Self:
        make_dense(inner)
        return cls(type(inner).__name__, inner, Positional(module, tuple(example)).eval(), example, outputs, sizes)

    def inputs(self, times: int = 1) -> tuple[Tensor, ...]:
        """The example, so many times as long on each axis that may change."""
        found = []
        for key, tensor in self.example.items():
            for axis in self.sizes[key]:
                tensor = torch.cat([tensor] * times, axis)
            found.append(tensor)
        return tuple(found)

    def facts(self) -> dict[str, Any]:
        """What `optkit_backends.graphs.facts.TensorFacts` wants to know of it."""
        with torch.inference_mode():
            small, large = self.module(*self.inputs()), self.module(*self.inputs(2))
        return {
            "inputs": {key: _described(tensor, self.sizes[key]) for key, tensor in self.example.items()},
            "outputs": {
                key: _described(one, [axis for axis in range(one.dim()) if one.shape[axis] != other.shape[axis]])
                for key, one, other in zip(self.outputs, small, large, strict=True)
            },
            "products": products_of(self.inner, lambda: self.module(*self.inputs()), needed=True),
            "torch": torch.__version__,
        }

    def least(self) -> tuple[Tensor, ...]:
        """The example with a size of 1 on each axis that may change."""
        found = []
        for key, tensor in self.example.items():
            for axis in self.sizes[key]:
                tensor = tensor.narrow(axis, 0, 1)
            found.append(tensor.contiguous())
        return tuple(found)

    def dynamic(self) -> list[list[int]]:
        """For each input the axes whose size may change."""
        return [list(self.sizes[key]) for key in self.example]


def _described(tensor: Tensor, dynamic: Sequence[int]) -> tuple[str, list[int | None]]:
    shape = [None if axis in dynamic else size for axis, size in enumerate(tensor.shape)]
    return str(tensor.dtype).removeprefix("torch."), shape
