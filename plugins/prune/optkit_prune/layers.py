"""Depth pruning: whole blocks go, those that change least."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from optkit.errors import OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.transforms import Transform, TransformContext
from optkit_prune.patterns import QUANTIZED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.blockwise import Stack
    from optkit.checkpoints import Checkpoint

__all__ = ["Layers"]

Batch = Mapping[str, "Tensor"]
_TOKENS = 4096
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


class Layers(Transform):
    """Removes whole blocks of a transformer: those that change their input least, or that its predictions need least.

    What is left computes what the model does with these blocks skipped. Memory, KV cache and time shrink by nearly the
    share of blocks on every backend, and the result is an ordinary model of fewer layers.

    By `influence` it costs one run of the model on the calibration data. By `perplexity` each block is left out in
    turn, and again after each removal, since losses do not add up: of two blocks that can each be spared, one may do
    the other's work (Song et al., SLEB). Blocks before the one that is left out are not run again, so that each removal
    from a model of 30 costs 15 runs on `tokens` of the data. Influence says nothing of what the later blocks make of a
    block's output: for few blocks of a small model perplexity is worth its time. Use `prune.recover` next, unless one
    or two blocks of a deep model go.

    Papers: Men et al., ShortGPT, arXiv:2403.03853, for influence; Gromov et al., The Unreasonable Ineffectiveness of
    the Deeper Layers, arXiv:2403.17887, for runs of blocks; Song et al., SLEB, arXiv:2402.09025, for perplexity.
    """

    requires = frozenset({"weights:float"})
    # Not of sparsity: blocks are chosen by what they do, and masks of those that stay are left alone.
    conflicts = QUANTIZED
    calibration = True

    count: int | None = Field(default=None, ge=1)
    """Blocks to remove. Give this or `ratio`."""
    ratio: float | None = Field(default=None, gt=0, le=0.95)
    """Share of the blocks to remove, rounded to whole ones."""
    by: Literal["influence", "perplexity"] = "influence"
    """`influence`: 1 - the cosine between a block's input and output, averaged over tokens. `perplexity`: the loss of
    the next token without the block."""
    contiguous: bool = False
    """Remove blocks that follow each other: the run over which hidden states change least, or that is missed least."""
    tokens: int | None = Field(default=None, ge=16)
    """Calibration tokens on which perplexity is measured; null: 4096. `influence` reads all."""

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if (self.count is None) == (self.ratio is None):
            raise ValueError("exactly one amount is needed; give count or ratio")
        if self.tokens is not None and self.by == "influence":
            raise ValueError("tokens goes with by: perplexity")
        return self

    def provides(self) -> frozenset[str]:
        return frozenset({"pruned:layers"})

    def check(self, card: ModelCard) -> None:
        self._count(card.layers)
        if _blocks(card) is None:
            what = f"its layers are not in {card.layers} blocks of their own, of which some could go"
            raise RecipeError(what, remedy="prune another way")
        if self.by == "perplexity" and "task:causal-lm" not in card.tags:
            what = "by: this model predicts no next token, so that it has no perplexity"
            raise RecipeError(what, found=self.by, remedy="use by: influence")

    def after(self, card: ModelCard) -> ModelCard:
        kept = card.layers - self._count(card.layers)
        blocks = _blocks(card) or {}
        gone = {name for index, names in blocks.items() if index >= kept for name in names}
        rest = _rest_of_block(card, blocks)
        weights = sum(out * inputs for out, inputs in (card.linears[name] for name in gone))
        return replace(
            card,
            linears={name: shape for name, shape in card.linears.items() if name not in gone},
            parameters=card.parameters - weights - (card.layers - kept) * rest,
            layers=kept,
            kv_values_per_token=card.kv_values_per_token * kept // card.layers,
        )

    def forward_passes(self) -> float:
        if self.by == "influence":
            return 1.0
        # As for 30 blocks and 128 windows of 512 tokens.
        rounds = 1 if self.contiguous else self.count or round(30 * (self.ratio or 0))
        return rounds * 15 * (self.tokens or _TOKENS) / 65_536

    def apply(self, model: Model, context: TransformContext) -> Model:
        import torch

        from optkit.blockwise import stack_of

        module: Any = model.module
        batches = context.calibration.inputs
        if not batches:
            raise OptkitError("there is no calibration data", remedy="give it in TransformContext.calibration")
        found = stack_of(module, batches[0])
        blocks = found.blocks
        if not blocks or getattr(getattr(module, "config", None), "num_hidden_layers", None) != len(blocks):
            raise OptkitError("has no list of blocks that follow each other, of which some could go", where="the model")
        count = self._count(len(blocks))
        start = {name: value[:1, :32] if value.dim() == 2 else value for name, value in batches[0].items()}
        module.to(context.device)
        try:
            with torch.no_grad():
                stack = _Stack(module, found, context.device)
                gone = self._chosen(stack, count, context)
                expected = stack.output(start, gone)
                _remove(module, list(blocks), gone)
                after = stack.output(start, ())
        finally:
            module.to("cpu")
        if not torch.allclose(after, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
            what = "without some blocks, the others do not compute what they did: they depend on their number"
            raise OptkitError(what, where=f"arch {module.config.model_type}", remedy="prune another way")
        told = f"removed {', '.join(map(str, sorted(gone)))} of {len(blocks)} blocks"
        context.progress(len(batches), len(batches), told)
        return model.tagged(*self.provides())

    def _count(self, layers: int) -> int:
        """Blocks to remove of so many.

        Raises:
            RecipeError: none, or all.
        """
        count = self.count or round(layers * (self.ratio or 0))
        if not 0 < count < layers:
            option = "count" if self.ratio is None else "ratio"
            what = f"{option} removes {count} of the model's {layers} blocks"
            raise RecipeError(what, found=self.count or self.ratio, remedy=f"remove 1 to {layers - 1}")
        return count

    def _chosen(self, stack: _Stack, count: int, context: TransformContext) -> frozenset[int]:
        if self.by == "influence":
            span = count if self.contiguous else 1
            changes = _changes(stack, span, context)
        elif self.contiguous:
            changes, span = self._losses(stack, (), count, context, context.checkpoint), count
        else:
            gone: frozenset[int] = frozenset()
            while len(gone) < count:
                losses = self._losses(stack, gone, 1, context, context.checkpoint.within(f"round-{len(gone)}"))
                gone |= {min(losses, key=losses.__getitem__)}
            return gone
        least = sorted(changes, key=changes.__getitem__)[: count // span]
        return frozenset(start + offset for start in least for offset in range(span))

    def _losses(
        self, stack: _Stack, gone: Collection[int], span: int, context: TransformContext, checkpoint: Checkpoint
    ) -> dict[int, float]:
        """The loss without each run of `span` blocks, by its first block, where `gone` are missing already."""
        batches = _sample(context.calibration.inputs, self.tokens or _TOKENS)
        starts = [start for start in range(len(stack) - span + 1) if start not in gone]
        kept = checkpoint.load("losses")
        sums: list[float] = [0.0] * len(starts) if kept is None else kept[1]["sums"]
        finished: int = 0 if kept is None else kept[1]["batches"]
        for done, batch in list(enumerate(batches))[finished:]:
            hidden = stack.hidden(batch, gone)
            for place, start in enumerate(starts):
                what = f"without block {start}" + (f" to {start + span - 1}" if span > 1 else "")
                context.progress(done * len(starts) + place, len(batches) * len(starts), what)
                sums[place] += stack.loss(batch, {*gone, *range(start, start + span)}, start, hidden[start])
            checkpoint.save("losses", {}, {"batches": done + 1, "sums": sums})
        return dict(zip(starts, sums, strict=True))


class _Stack:
    """A model of blocks, some of which may be skipped, on its device."""

    def __init__(self, module: nn.Module, stack: Stack, device: str) -> None:
        self._module, self._stack, self._device = module, stack, device
        self._blocks = list(stack.blocks.values())

    def __len__(self) -> int:
        return len(self._blocks)

    def output(self, batch: Batch, gone: Collection[int], start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """The model's output for a batch without some blocks; those before `start` have given `hidden`, if any."""
        from optkit.blockwise import output_of, patched

        def skip(*args: Any, **_: Any) -> Any:
            return self._stack.given(args[0])

        def give(*_: Any, **__: Any) -> Any:
            return self._stack.given(hidden)

        with ExitStack() as patches:
            for index, block in enumerate(self._blocks):
                if index == start and hidden is not None:
                    assert index in gone
                    patches.enter_context(patched(block, give))
                elif index in gone or (index < start and hidden is not None):
                    patches.enter_context(patched(block, skip))
            return output_of(self._module, {name: value.to(self._device) for name, value in batch.items()})

    def hidden(self, batch: Batch, gone: Collection[int]) -> list[Tensor]:
        """What each block reads, and last what the last one gives, `[rows, tokens, features]`."""
        seen: list[Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])

        def after(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(output[0] if self._stack.tuples else output)

        with ExitStack() as hooks:
            for block in self._blocks:
                hooks.callback(block.register_forward_pre_hook(before).remove)
            hooks.callback(self._blocks[-1].register_forward_hook(after).remove)
            self.output(batch, gone)
        return seen

    def loss(self, batch: Batch, gone: Collection[int], start: int, hidden: Tensor) -> float:
        """Of the next token, in nats, summed over the batch."""
        from torch.nn.functional import cross_entropy

        logits = self.output(batch, gone, start, hidden)[:, :-1].flatten(0, 1)
        wanted = batch["input_ids"][:, 1:].flatten().to(self._device)
        return float(cross_entropy(logits, wanted, reduction="sum"))


def _changes(stack: _Stack, span: int, context: TransformContext) -> dict[int, float]:
    """How much each run of `span` blocks turns the hidden states, by its first block: the sum of 1 - cosine."""
    from torch.nn.functional import cosine_similarity

    sums = dict.fromkeys(range(len(stack) - span + 1), 0.0)
    batches = context.calibration.inputs
    for done, batch in enumerate(batches):
        context.progress(done, len(batches), "influence of blocks")
        hidden = stack.hidden(batch, ())
        for start in sums:
            before, after = hidden[start].double(), hidden[start + span].double()
            sums[start] += float((1 - cosine_similarity(before, after, dim=-1)).sum())
    return sums


def _sample(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Batches at even distances that have about so many tokens together."""
    mean = sum(batch["input_ids"].numel() for batch in batches) / len(batches)
    count = min(len(batches), max(1, round(tokens / mean)))
    return [batches[place * len(batches) // count] for place in range(count)]


def _remove(module: Any, paths: Sequence[str], gone: Collection[int]) -> None:
    """Take blocks out, and let the configuration and the others' numbers say so."""
    from torch import nn

    from optkit.quantized import replace_module

    config, depth = module.config, len(paths)
    kept = [index for index in range(depth) if index not in gone]
    blocks = nn.ModuleList([module.get_submodule(paths[index]) for index in kept])
    replace_module(module, paths[0].rpartition(".")[0], blocks)
    part: Any
    for number, block in enumerate(blocks):
        for part in block.modules():
            if type(getattr(part, "layer_idx", None)) is int:
                part.layer_idx = number
    for part in module.modules():
        for name in _DEPTHS:
            if vars(part).get(name) == depth:
                setattr(part, name, len(kept))
    # Lists with an entry for each block: layer_types, no_rope_layers, ...
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth and "layer" in name:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def _blocks(card: ModelCard) -> dict[int, list[str]] | None:
    """The linear layers of each block, by its number; None where no numbers go from 0 to the model's depth."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in card.linears:
        match = re.match(r"(.*?)\.?\b(\d+)\.", name)
        if match is not None:
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    whole = [blocks for blocks in found.values() if sorted(blocks) == list(range(card.layers))]
    return whole[0] if len(whole) == 1 else None


def _rest_of_block(card: ModelCard, blocks: Mapping[int, Iterable[str]]) -> int:
    """Parameters of a block besides its matrices: norms and biases. Exact for Llama's and BERT's kind."""
    if "task:causal-lm" not in card.tags:
        return sum(card.linears[name][0] for name in blocks.get(0, ())) + 4 * card.hidden_size
    weights = sum(
        out * inputs for name, (out, inputs) in card.linears.items() if name != "lm_head" or not card.tied_head
    )
    # Besides the blocks there are the embedding and a last norm.
    return (card.parameters - weights - (card.vocab_size + 1) * card.hidden_size) // card.layers
