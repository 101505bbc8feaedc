"""How much a language model's predictions change when one group of its layers is rounded, and all others are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from optkit.blockwise import Stack, patched, stack_of
from optkit.errors import OptkitError
from optkit.transforms import TransformContext
from optkit_quantize.candidates import Rounding
from optkit_quantize.rounding import grouped

if TYPE_CHECKING:
    from optkit.schemes import WeightScheme

__all__ = ["divergences"]

_WINDOW = 128
_KEPT = "sensitivity"


def divergences(
    module: nn.Module,
    groups: Sequence[Sequence[str]],
    schemes: Sequence[WeightScheme],
    rounding: Rounding,
    context: TransformContext,
    tokens: int,
) -> list[list[float]]:
    """KL divergence of the model's next-token distribution from that with one group rounded in one scheme.

    The hidden states before each block are kept, so that only the blocks from the group's own on are run again. Each
    finished group is kept in the checkpoint. The whole model is on `context.device` meanwhile, with the predictions of
    all tokens: `tokens` x vocabulary float32.

    Args:
        module: a causal language model, unquantized, on the CPU; comes back as it was.
        groups: paths of the linear layers that are rounded together.
        schemes: each group is rounded in each of them.
        rounding: gives a layer's weight in a scheme.
        context: calibration data, device, checkpoint, progress.
        tokens: about how many to run on, as pieces of windows at even distances, each of 128 tokens or the window.

    Returns:
        Mean over all tokens, in nats, `[group][scheme]`.

    Raises:
        OptkitError: there is no calibration data, or a weight or the predictions are not finite.
    """
    if not context.calibration.inputs:
        raise OptkitError("there is no calibration data", remedy="give it in TransformContext.calibration")
    batches = _pieces(context.calibration.inputs, tokens)
    for name in (name for names in groups for name in names):
        grouped(_weight(module, name), schemes[0], name=name)  # refuses what is not finite, by its own name
    stack = stack_of(module, batches[0])
    found = context.checkpoint.load(_KEPT)
    measured: list[list[float]] = [] if found is None else found[1]["divergences"]
    if len(measured) == len(groups):
        return measured
    total = len(groups) * len(schemes) * len(batches)
    try:
        module.to(context.device)
        batches = [{name: value.to(context.device) for name, value in batch.items()} for batch in batches]
        hidden, expected = _reference(module, stack, batches)
        for names in groups[len(measured) :]:
            start = _start(module, stack, names)
            row: list[float] = []
            for scheme in schemes:
                what = f"{names[0]} in {scheme.bits} bits"
                done = (len(measured) * len(schemes) + len(row)) * len(batches)
                with _rounded(module, names, scheme, rounding):
                    sums = []
                    for index, batch in enumerate(batches):
                        context.progress(done + index, total, what)
                        given = hidden[start][index] if start else None
                        sums.append(_divergence(expected[index], _logits(module, stack, start, given, batch)))
                # Rounding in the sums may take it a hair below zero.
                row.append(max(sum(sums) / sum(len(rows) for rows in expected), 0.0))
            measured.append(row)
            context.checkpoint.save(_KEPT, {}, {"divergences": measured})
    finally:
        module.to("cpu")
    return measured


def _pieces(batches: Sequence[Mapping[str, Tensor]], tokens: int) -> list[dict[str, Tensor]]:
    """The beginnings of windows at even distances."""
    length = min(_WINDOW, batches[0]["input_ids"].shape[1], tokens)
    count = min(max(round(tokens / length), 1), len(batches))
    chosen = [batches[index * len(batches) // count] for index in range(count)]
    return [{name: value[:, :length] for name, value in batch.items()} for batch in chosen]


def _weight(module: nn.Module, name: str) -> Tensor:
    layer: Any = module.get_submodule(name)
    weight: Tensor = layer.weight
    return weight


def _reference(
    module: nn.Module, stack: Stack, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """What goes into each block, and at last comes out, `[block][batch]`, and the log-probabilities of each batch."""
    blocks = list(stack.blocks.values())
    hidden: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            kept = hidden[index]
            handle = block.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            hooks.callback(handle.remove)
        if blocks:
            handle = blocks[-1].register_forward_hook(
                lambda _, __, output: hidden[-1].append(output if isinstance(output, Tensor) else output[0])
            )
            hooks.callback(handle.remove)
        expected = [_logits(module, stack, 0, None, batch).float().log_softmax(-1) for batch in batches]
    if not all(rows.isfinite().all() for rows in expected):
        raise OptkitError(
            "the model's predictions on the calibration data are not finite",
            remedy="check the model, and the transforms before this one",
        )
    return hidden, expected


def _start(module: Any, stack: Stack, names: Sequence[str]) -> int:
    """The first block whose output depends on one of these layers; their number if only what follows them does."""
    starts = []
    for name in names:
        weight = _weight(module, name)
        inside = [index for index, path in enumerate(stack.blocks) if name == path or name.startswith(f"{path}.")]
        head = module.get_output_embeddings()
        read_early = any(isinstance(part, nn.Embedding) and part.weight is weight for part in module.modules())
        if inside:
            starts.append(inside[0])
        elif head is not None and head.weight is weight and not read_early:
            starts.append(len(stack.blocks))
        else:
            starts.append(0)
    return min(starts)


def _logits(module: nn.Module, stack: Stack, passed: int, given: Tensor | None, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits, `[tokens, vocabulary]`, where the first blocks are `passed` and the last of them gives
    `given`.
    """

    def skip(*args: Any, **_: Any) -> Any:
        return stack.given(args[0])

    def give(*_: Any, **__: Any) -> Any:
        return stack.given(given)

    with ExitStack() as patches, torch.no_grad():
        for index, block in enumerate(list(stack.blocks.values())[:passed]):
            patches.enter_context(patched(block, give if index == passed - 1 else skip))
        logits: Tensor = module(**batch, use_cache=False).logits
    return logits[0]


def _divergence(expected: Tensor, logits: Tensor) -> float:
    """Summed over the tokens."""
    found = logits.float().log_softmax(-1)
    return float(nn.functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1).double().sum())


@contextmanager
def _rounded(module: nn.Module, names: Sequence[str], scheme: WeightScheme, rounding: Rounding) -> Iterator[None]:
    weights = {name: _weight(module, name) for name in names}
    exact = {name: weight.data for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data = rounding(name, scheme).to(weight)
        yield
    finally:
        for name, weight in weights.items():
            weight.data = exact[name]
