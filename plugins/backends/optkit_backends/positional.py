"""Modules as graphs want them: tensors in by position, a tuple of tensors out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Positional", "TextEncoder", "outputs_of", "shallow_copy", "text_example"]


class TextEncoder(nn.Module):
    """A transformers encoder from token ids and mask `[batch, tokens]` to its last layer's output, float32."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._typed = "token_type_ids" in inspect.signature(module.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        types = {"token_type_ids": torch.zeros_like(input_ids)} if self._typed else {}
        output = self.module(input_ids=input_ids, attention_mask=attention_mask, **types)
        return {"last_hidden_state": output.last_hidden_state}


class Positional(nn.Module):
    """A module that is called by name, called by position."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self._names = module, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(outputs_of(self.module(**dict(zip(self._names, tensors, strict=True)))).values())


def outputs_of(output: Any) -> dict[str, Tensor]:
    """The tensors that a module gave, by name: `output` where there is one, else by key or place."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    return {f"output_{index}": value for index, value in enumerate(output)}


def text_example() -> dict[str, Tensor]:
    """Inputs of a `TextEncoder`. Of unequal lengths: exporters drop a mask that only holds ones."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": mask.clone(), "attention_mask": mask}


def shallow_copy(module: nn.Module) -> Any:
    """A copy whose layers can be replaced, with the very tensors of `module`."""
    tensors = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, tensors)
