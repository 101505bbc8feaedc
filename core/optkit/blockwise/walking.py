"""Finding a model's blocks, running them one after another, and handing them out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optkit.blockwise.kept import keep, resumed
from optkit.errors import OptkitError
from optkit.transforms import TransformContext

__all__ = ["Block", "Call", "blocks_of", "output_of", "patched", "walk"]

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
    """

    def __init__(self, path: str, module: nn.Module, root: nn.Module, names: Sequence[str], runs: _Runs) -> None:
        self.path, self.module, self.names = path, module, tuple(names)
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
                hooks.enter_context(_removed(self._root.get_submodule(name).register_forward_pre_hook(hook(name))))
            for _ in self.run():
                pass

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
            _removed(self._root.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)),
            torch.no_grad(),
        ):
            for run in self._runs[::step]:
                run()
        return found


_Runs = Sequence[Callable[[], Tensor]]


def walk(module: nn.Module, context: TransformContext, names: Collection[str]) -> Iterator[Block]:
    """The blocks of a model in which the layers `names` are, in order, each on `context.device`.

    When the caller asks for the next one, the block as it is then is run on all batches to make the inputs of the next
    one, and is kept in the checkpoint. Blocks that a checkpoint holds are put back and not given out again. The model's
    blocks are the modules of its largest `ModuleList`, if each gets the output of the one before; else the whole model
    is one block.

    Args:
        module: on the CPU, in evaluation mode.
        context: calibration data, device, checkpoint, progress.
        names: paths of modules.

    Raises:
        OptkitError: there is no calibration data, or a block gives NaN or infinite numbers.
    """
    batches = context.calibration.inputs
    if not batches:
        raise OptkitError("there is no calibration data", remedy="give it in TransformContext.calibration")
    blocks = blocks_of(module, batches[0])
    within = {path: [name for name in names if name == path or name.startswith(f"{path}.")] for path in blocks}
    around = [name for name in names if not any(name in inside for inside in within.values())]
    total = sum(1 for inside in within.values() if inside) + bool(around)
    done = 0
    calls = _entries(module, list(blocks.values()), batches) if blocks else []
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
            if chosen:
                yield Block(path, block, module, chosen, told.around(runs))
            block.to(context.device)  # layers that the caller put in
            if index < last or around:
                hidden = [_finite(_run(run), path).cpu() for run in told.around(runs)]
            block.to("cpu")
            keep(block, index, hidden, context)
        done += bool(chosen)
    if around:
        path = "around the blocks" if blocks else "the model"
        runs = [
            _whole_run(module, list(blocks.values()), batch, i, hidden, context.device)
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
        return _first(block(hidden.to(device), *moved.args[1:], **moved.kwargs))

    return run


def _whole_run(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    batch: Mapping[str, Tensor],
    index: int,
    hidden: Sequence[Tensor],
    device: str,
) -> Callable[[], Tensor]:
    """Run the model with the blocks' outputs in the place of its blocks."""

    def run() -> Tensor:
        with ExitStack() as patches:
            for position, block in enumerate(blocks):
                given = hidden[index].to(device) if position == len(blocks) - 1 else None
                patches.enter_context(
                    patched(block, lambda *args, _given=given, **_: args[0] if _given is None else _given)
                )
            return output_of(module, _moved(dict(batch), device))

    return run


def _run(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


def blocks_of(module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Paths and modules of a model's blocks, in order: those of its largest `ModuleList`.

    Empty if one of them does not get the output of the one before.

    Args:
        module: the model.
        batch: what to run it on; only the start of a text is used.
    """
    lists = {path: found for path, found in module.named_modules() if isinstance(found, nn.ModuleList) and len(found)}
    if not lists:
        return {}
    path = max(lists, key=lambda path: sum(parameter.numel() for parameter in lists[path].parameters()))
    blocks = {f"{path}.{index}" if path else str(index): block for index, block in enumerate(lists[path])}
    gave: list[Any] = []
    follows: list[bool] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        follows.append(bool(args) and (args[0] is gave[-1] if gave else isinstance(args[0], Tensor)))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        gave.append(_first(output) if isinstance(output, Tensor | tuple) else None)

    # A few tokens are enough to see who follows whom.
    short = {name: value[:1, :8] if name in ("input_ids", "attention_mask") else value for name, value in batch.items()}
    order: list[nn.Module] = []
    with ExitStack() as hooks:
        for block in blocks.values():
            hooks.enter_context(_removed(block.register_forward_pre_hook(before)))
            hooks.enter_context(_removed(block.register_forward_hook(after)))
            hooks.enter_context(_removed(block.register_forward_pre_hook(lambda m, _: order.append(m))))
        with torch.no_grad():
            _forward(module, short)
    return blocks if all(follows) and order == list(blocks.values()) else {}


class _Reached(Exception):
    """The last block was called: nobody needs the rest of the model."""


def _entries(
    module: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> list[list[Call]]:
    """How each block is called for each batch, `[block][batch]`; only block 0 keeps hidden states."""
    calls: list[list[Call]] = [[] for _ in blocks]

    def entry(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Blocks after the first would each hold the same hidden states.
            calls[index].append(Call(args if index == 0 else (None, *args[1:]), kwargs))
            if index == len(blocks) - 1:
                raise _Reached
            return args[0]

        return forward

    with ExitStack() as patches, torch.no_grad():
        for index, block in enumerate(blocks):
            patches.enter_context(patched(block, entry(index)))
        for batch in batches:
            try:
                _forward(module, batch)
            except _Reached:
                continue
    return calls


def output_of(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The main tensor that a model gives for a batch, logits or hidden states for example.

    Args:
        module: the model.
        batch: keyword arguments of its `forward`, as in `Calibration.inputs`, on its device.
    """
    return _first(_forward(module, batch))


def _forward(module: nn.Module, batch: Mapping[str, Any]) -> Any:
    # Transformers' models would fill a KV cache that nobody reads.
    extra = {"use_cache": False} if hasattr(module, "config") else {}
    return module(**batch, **extra)


def _first(output: Any) -> Tensor:
    """The main tensor of what a module gives: itself, or the first of a tuple or of transformers' output classes."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


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


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
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
