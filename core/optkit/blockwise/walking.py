"""Finding a model's blocks, running them one after another, and handing them out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optkit.blockwise.kept import keep, resumed
from optkit.blockwise.stacks import Stack, first_of, forward, output_of, patched, removed, stack_of
from optkit.errors import OptkitError
from optkit.transforms import TransformContext

__all__ = ["Block", "Call", "walk"]

_DONE = "done"


@dataclass(slots=True)
class Call:
    """One call of a module on one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def moved(self, device: str) -> Call:
        """With its tensors on another device."""
        return Call(_moved(self.args, device), _moved(self.kwargs, device))


class Block:
    """A part of a model that runs by itself: a layer of a transformer, or what is around them.

    Attributes:
        path: of the block in the model; empty for what is around the blocks, and for a model without blocks.
        module: the block; the whole model where `path` is empty.
        names: paths in the model of the layers in it that the caller chose.
        watched: the outputs of the last `watch`, `[rows, ...]` each, on the CPU.
    """

    def __init__(self, path: str, module: nn.Module, root: nn.Module, names: Sequence[str], runs: _Runs) -> None:
        self.path, self.module, self.names = path, module, tuple(names)
        self.watched: list[Tensor] = []
        self._root, self._runs = root, runs

    def run(self) -> Iterator[Tensor]:
        """The block's output for each batch, `[rows, ...]`, with the weights that it has now. No gradients."""
        for run in self._runs:
            yield _run(run)

    def watch(self, names: Iterable[str], see: Callable[[str, Tensor], None]) -> None:
        """Run all batches, and call `see(path, input)` with each input of these modules.

        Args:
            names: paths in the model; modules outside the block are never called.
            see: gets the first positional argument, in the module's own shape.
        """

        def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, args: see(name, args[0])

        with ExitStack() as hooks:
            for name in names:
                hooks.enter_context(removed(self._root.get_submodule(name).register_forward_pre_hook(hook(name))))
            self.watched = [output.cpu() for output in self.run()]

    def calls(self, name: str, most: int | None = None) -> list[Call]:
        """The calls of a module in the block, one a batch, to run it again by itself.

        Args:
            name: its path in the model.
            most: how many batches to run, evenly spaced; all if None.
        """
        step = 1 if most is None else -(-len(self._runs) // most)
        found: list[Call] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Call(args, dict(kwargs)))

        with (
            removed(self._root.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)),
            torch.no_grad(),
        ):
            for run in self._runs[::step]:
                run()
        return found


_Runs = Sequence[Callable[[], Tensor]]


def walk(
    module: nn.Module, context: TransformContext, names: Collection[str], *, changed: bool = True
) -> Iterator[Block]:
    """The blocks of a model in which the layers `names` are, in order, each on `context.device`.

    When the caller asks for the next one, the block as it is then is run on all batches to make the inputs of the next
    one, and is kept in the checkpoint. Blocks that a checkpoint holds are put back and not given out again. The model's
    blocks are the modules of its largest `ModuleList`, if each gets the output of the one before; else the whole model
    is one block.

    Args:
        module: on the CPU, in evaluation mode.
        context: calibration data, device, checkpoint, progress.
        names: paths of modules.
        changed: whether the caller changes blocks. If not, what a block gave while it was watched goes to the next one,
            and it is not run again.

    Raises:
        OptkitError: there is no calibration data, or a block gives NaN or infinite numbers.
    """
    batches = context.calibration.inputs
    if not batches:
        raise OptkitError("there is no calibration data", remedy="give it in TransformContext.calibration")
    stack = stack_of(module, batches[0])
    blocks = stack.blocks
    within = {path: [name for name in names if name == path or name.startswith(f"{path}.")] for path in blocks}
    around = [name for name in names if not any(name in inside for inside in within.values())]
    total = sum(1 for inside in within.values() if inside) + bool(around)
    done = 0
    calls = _entries(module, stack, batches) if blocks else []
    hidden: list[Tensor] = [call.args[0] for call in calls[0]] if blocks else []
    finished, hidden = resumed(blocks, hidden, context)
    # Nothing reads what a block gives if no chosen layer comes after it.
    last = len(blocks) - 1 if around else max((i for i, path in enumerate(blocks) if within[path]), default=-1)
    for index, (path, block) in enumerate(blocks.items()):
        if index > last:
            break
        chosen = within[path]
        if index >= finished:
            block.to(context.device)
            runs = [
                _block_run(block, call, value, context.device) for call, value in zip(calls[index], hidden, strict=True)
            ]
            told = _Told(context, done, total, path)
            given = Block(path, block, module, chosen, told.around(runs))
            if chosen:
                yield given
            block.to(context.device)  # layers that the caller put in
            if index < last or around:
                outputs = given.watched if given.watched and not changed else map(_run, told.around(runs))
                hidden = [_finite(output, path).cpu() for output in outputs]
            block.to("cpu")
            keep(block, index, hidden, context)
        done += bool(chosen)
    if around:
        path = "around the blocks" if blocks else "the model"
        runs = [
            _whole_run(module, stack, batch, hidden[i] if blocks else None, context.device)
            for i, batch in enumerate(batches)
        ]
        _move_around(module, blocks.values(), context.device)
        yield Block("", module, module, around, _Told(context, done, total, path).around(runs))
        _move_around(module, blocks.values(), "cpu")
        done += 1
    context.progress(done, total, _DONE)


class _Told:
    """Tells the user of every batch."""

    def __init__(self, context: TransformContext, done: int, total: int, what: str) -> None:
        self._context, self._done, self._total, self._what = context, done, total, what

    def around(self, runs: _Runs) -> _Runs:
        def telling(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def told() -> Tensor:
                self._context.progress(self._done, self._total, self._what)
                return run()

            return told

        return [telling(run) for run in runs]


def _block_run(block: nn.Module, call: Call, hidden: Tensor, device: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        moved = call.moved(device)
        return first_of(block(hidden.to(device), *moved.args[1:], **moved.kwargs))

    return run


def _whole_run(
    module: nn.Module, stack: Stack, batch: Mapping[str, Tensor], hidden: Tensor | None, device: str
) -> Callable[[], Tensor]:
    """Run the model with the output of its blocks in the place of these."""

    def skip(*args: Any, **_: Any) -> Any:
        return stack.given(args[0])

    def give(*_: Any, **__: Any) -> Any:
        assert hidden is not None
        return stack.given(hidden.to(device))

    def run() -> Tensor:
        with ExitStack() as patches:
            for left, block in enumerate(reversed(stack.blocks.values())):
                patches.enter_context(patched(block, skip if left else give))
            return output_of(module, _moved(dict(batch), device))

    return run


def _run(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


class _Reached(Exception):
    """The last block was called: nobody needs the rest of the model."""


def _entries(module: nn.Module, stack: Stack, batches: Sequence[Mapping[str, Tensor]]) -> list[list[Call]]:
    """How each block is called for each batch, `[block][batch]`; only block 0 keeps hidden states."""
    calls: list[list[Call]] = [[] for _ in stack.blocks]

    def entry(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Blocks after the first would each hold the same hidden states.
            calls[index].append(Call(args if index == 0 else (None, *args[1:]), kwargs))
            if index == len(calls) - 1:
                raise _Reached
            return stack.given(args[0])

        return forward

    with ExitStack() as patches, torch.no_grad():
        for index, block in enumerate(stack.blocks.values()):
            patches.enter_context(patched(block, entry(index)))
        for batch in batches:
            try:
                forward(module, batch)
            except _Reached:
                continue
    return calls


def _finite(hidden: Tensor, path: str) -> Tensor:
    if not torch.isfinite(hidden).all():
        raise OptkitError(
            "gives NaN or infinite numbers on the calibration data",
            where=path,
            remedy="check the model, and the transforms before this one",
        )
    return hidden


def _moved(value: Any, device: str) -> Any:
    match value:
        case Tensor():
            return value.to(device)
        case tuple():
            return tuple(_moved(item, device) for item in value)
        case dict():
            return {key: _moved(item, device) for key, item in value.items()}
        case _:
            return value


def _move_around(module: nn.Module, blocks: Iterable[nn.Module], device: str) -> None:
    """Move what is in no block."""
    inside = {part for block in blocks for part in block.modules()}
    for part in module.modules():
        if part not in inside:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, buffer.to(device))
