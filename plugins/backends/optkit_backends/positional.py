"""Modules as graphs want them: tensors in by position, a tuple of tensors out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from optkit.model import Model
from optkit.weights import IMAGE_CLASSIFICATION, ImagePreparation

__all__ = ["Call", "Positional", "call_of", "outputs_of", "shallow_copy"]


@dataclass(frozen=True, slots=True)
class Call:
    """How a transformers model is called that answers in one call, in the same words whatever its task is."""

    around: Callable[[Any], nn.Module]
    """Makes a module of tensors by name, in and out, of the model's own module or a copy of it."""
    example: Mapping[str, Tensor]
    """What it can be called with, by name."""
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Sequence[int]]
    """The axes of each input whose size may change."""


def call_of(model: Model) -> Call:
    """How an encoder without a head or an image classifier is called.

    Inputs of an encoder are `input_ids` and `attention_mask` `[batch, tokens]` int64, its output is `last_hidden_state`
    `[batch, tokens, hidden]` float32. The input of a classifier is `pixel_values` `[batch, channels, height, width]`
    float32, of the size that the model's image processor gives, its output `logits` `[batch, classes]` float32.
    """
    if IMAGE_CLASSIFICATION in model.tags:
        images = _image_example(model)
        return Call(_ImageClassifier, images, ("logits",), dict.fromkeys(images, (0,)))
    texts = _text_example()
    return Call(_TextEncoder, texts, ("last_hidden_state",), dict.fromkeys(texts, (0, 1)))


class _TextEncoder(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._typed = "token_type_ids" in inspect.signature(module.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        types = {"token_type_ids": torch.zeros_like(input_ids)} if self._typed else {}
        output = self.module(input_ids=input_ids, attention_mask=attention_mask, **types)
        return {"last_hidden_state": output.last_hidden_state}


class _ImageClassifier(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.module(pixel_values=pixel_values).logits}


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


def _text_example() -> dict[str, Tensor]:
    # Of unequal lengths: exporters drop a mask that only holds ones.
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": mask.clone(), "attention_mask": mask}


def _image_example(model: Model) -> dict[str, Tensor]:
    shape = ImagePreparation.of(model).shape
    return {"pixel_values": torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))}


def shallow_copy(module: nn.Module) -> Any:
    """A copy whose layers can be replaced, with the very tensors of `module`."""
    tensors = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, tensors)
