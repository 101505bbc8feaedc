"""A model's blocks that follow each other, and running a model with something else in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Stack", "first_of", "forward", "output_of", "patched", "removed", "stack_of"]


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks of which each gets the hidden states that the one before gives."""

    blocks: dict[str, nn.Module]
    """By path, in order; empty where a model has no such blocks."""
    tuples: bool
    """Whether they give tuples that begin with the hidden states, and not these alone."""

    def given(self, hidden: Any) -> Any:
        """What a block would give whose hidden states these are."""
        return (hidden,) if self.tuples else hidden


def stack_of(module: nn.Module, batch: Mapping[str, Tensor]) -> Stack:
    """A model's blocks: those of its largest `ModuleList`, if each gets the output of the one before.

    Args:
        module: the model.
        batch: what to run it on; only the start of a text is used.
    """
    lists = {path: found for path, found in module.named_modules() if isinstance(found, nn.ModuleList) and len(found)}
    if not lists:
        return Stack({}, False)
    path = max(lists, key=lambda path: sum(parameter.numel() for parameter in lists[path].parameters()))
    blocks = {f"{path}.{index}" if path else str(index): block for index, block in enumerate(lists[path])}
    gave: list[Any] = []
    follows: list[bool] = []
    tuples: list[bool] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        follows.append(bool(args) and (args[0] is gave[-1] if gave else isinstance(args[0], Tensor)))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        gave.append(first_of(output) if isinstance(output, Tensor | tuple) else None)
        tuples.append(isinstance(output, tuple))

    # A few tokens are enough to see who follows whom.
    short = {name: value[:1, :8] if name in ("input_ids", "attention_mask") else value for name, value in batch.items()}
    order: list[nn.Module] = []
    with ExitStack() as hooks:
        for block in blocks.values():
            hooks.enter_context(removed(block.register_forward_pre_hook(before)))
            hooks.enter_context(removed(block.register_forward_hook(after)))
            hooks.enter_context(removed(block.register_forward_pre_hook(lambda m, _: order.append(m))))
        with torch.no_grad():
            forward(module, short)
    if not all(follows) or order != list(blocks.values()) or len(set(tuples)) > 1:
        return Stack({}, False)
    return Stack(blocks, tuples[0])


def output_of(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The main tensor that a model gives for a batch, logits or hidden states for example.

    Args:
        module: the model.
        batch: keyword arguments of its `forward`, as in `Calibration.inputs`, on its device.
    """
    return first_of(forward(module, batch))


def forward(module: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What a model gives for a batch, in its own class; as for `output_of`."""
    # Transformers' models of text would fill a KV cache that nobody reads.
    extra = {"use_cache": False} if hasattr(module, "config") and "input_ids" in batch else {}
    return module(**batch, **extra)


def first_of(output: Any) -> Tensor:
    """The main tensor of what a module gives: itself, or the first of a tuple or of transformers' output classes."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    """Removes a hook in the end."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def patched(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """A module with another `forward` for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
