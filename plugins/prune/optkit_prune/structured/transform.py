"""`prune.structured`: FFN channels, heads, width or convolution channels go, and the model really is smaller."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from optkit.errors import OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.schemes import SHAPES_ENTRY
from optkit.transforms import Transform, TransformContext
from optkit_prune.patterns import QUANTIZED
from optkit_prune.structured.layout import Sheet, sheet_of
from optkit_prune.structured.pools import (
    MOST,
    Cost,
    Kept,
    Pool,
    by_ratio,
    by_share,
    number_of,
    smallest_share,
    totals,
    whole,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit_prune.structured.importance import Ranking
    from optkit_prune.structured.structures import Structure

__all__ = ["Structured"]

Batch = Mapping[str, "Tensor"]
_BUDGETS = ("parameters", "flops", "latency")
# So many tokens are assumed for the memory of a sample's gradients.
_SAMPLE = 512


class Structured(Transform):
    """Removes FFN channels, attention heads, embedding width or the channels of convolutions, with all that goes with
    them.

    What is left is a smaller model of the same kind: files, memory and time shrink on every backend. The model computes
    exactly what it does with the removed units at zero (but for `width`, which norms depend on); this is checked, and
    so are the shapes. Uniform results of decoders load in plain transformers. An encoder of fewer heads does not, since
    its configuration has no size of heads, nor does what differs between layers (`allocation: global`): both load
    through optkit.

    `magnitude` and `random` cost seconds. `activation` runs the model on the calibration data block by block; `taylor`
    and `hessian` also go back through the whole model, for the gradients by a factor on each unit, with the memory of
    one sample's activations. The loss is that of the next token. For encoders and convolutional networks, whose labels
    nobody knows, it is the output times random signs, whose squared gradient is on average the Gauss-Newton Hessian of
    the squared distance from the output as it is.

    Not without `prune.recover` afterwards: at 25% of the FFN channels a small language model writes gibberish before.
    Not for `width` if anything else will do: everything reads it. Query heads of grouped-query attention save little,
    as keys and values stay.

    Papers: Fang et al., DepGraph, arXiv:2301.12900, for what goes together; Sun et al., Wanda, arXiv:2306.11695, for
    `activation`; Molchanov et al., arXiv:1611.06440, for `taylor`: the mean absolute gradient by the factors; Kwon et
    al., A Fast Post-Training Pruning Framework for Transformers, arXiv:2204.09656, for `hessian`: its mean square.
    """

    requires = frozenset({"weights:float"})
    # Ranked by zeros; and a product of two thin matrices is no layer of a known name.
    conflicts = QUANTIZED | {"sparsity:*", "pruned:rank"}

    parts: tuple[Literal["ffn", "heads", "width", "channels"], ...] = Field(default=("ffn",), min_length=1)
    """What to prune: channels of FFNs, attention heads, the width of embeddings and of all that reads them, or, alone,
    channels of convolutions."""
    importance: Literal["magnitude", "taylor", "activation", "hessian", "random"] = "activation"
    """What decides who goes: the L2 norm of the weights that go with a unit; the change of the loss to first order;
    magnitudes of the weights that read a unit times the norm of what they read; the change of the loss to second
    order; or chance, as a control."""
    ratio: float | None = Field(default=None, gt=0, le=0.95)
    """Share of each part that goes, rounded to `round_to`; of heads a whole number. Give this, `parameters`, `flops` or
    `latency`."""
    parameters: str | None = None
    """Budget: parameters that may stay, as a share (`80%`) or a number (`108M`). The smallest share of each part goes
    that fits."""
    flops: str | None = None
    """Budget: multiplications of linear layers and convolutions that may stay, as a share."""
    latency: str | None = None
    """Budget: the time of a run on calibration data, as a share of what the model takes now, measured here."""
    allocation: Literal["uniform", "global"] = "uniform"
    """`uniform`: the same share of each layer. `global`: as many of each part in all, where they are missed least."""
    round_to: int | None = Field(default=None, ge=1, le=4096)
    """What stays of a layer's channels, and of the width, is a multiple of it, so that groups of quantization fit.
    null: 32, and for convolutions 1."""
    kv_groups: bool = False
    """Remove KV heads with all query heads that share them, instead of query heads only, as many of each KV head."""
    seed: int = Field(default=0, ge=0)
    """Of `random`, and of the random signs."""

    @field_validator("parameters", "flops", "latency")
    @classmethod
    def _budget(cls, budget: str | None, info: Any) -> str | None:
        if budget is not None:
            if number_of(budget) is None:
                raise ValueError("a share is between 0% and 100%, such as 80%; a number is such as 108M")
            if info.field_name != "parameters" and not budget.endswith("%"):
                raise ValueError("is a share, such as 80%")
        return budget

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        amounts = (self.ratio, self.parameters, self.flops, self.latency)
        if sum(amount is not None for amount in amounts) != 1:
            raise ValueError("exactly one amount is needed; give ratio, parameters, flops or latency")
        if len(set(self.parts)) != len(self.parts):
            raise ValueError("parts repeats a part; name each once")
        if "channels" in self.parts and len(self.parts) > 1:
            raise ValueError("channels goes without other parts")
        if self.parts == ("width",) and self.allocation == "global":
            raise ValueError("width is one for all layers, so that nothing is left to allocation")
        if self.kv_groups and "heads" not in self.parts:
            raise ValueError("kv_groups goes with heads in parts")
        return self

    @property
    def calibration(self) -> bool:  # type: ignore[override]  # whether it learns from data is a matter of its options
        learns = self.importance in ("taylor", "activation", "hessian")
        return learns or self.latency is not None or "channels" in self.parts

    @property
    def _step(self) -> int:
        return self.round_to or (1 if "channels" in self.parts else 32)

    def provides(self) -> frozenset[str]:
        differing = {"shape:pruned"} if self.allocation == "global" else set()
        return frozenset({f"pruned:{part}" for part in self.parts} | differing)

    def check(self, card: ModelCard) -> None:
        if "channels" in self.parts:
            if not card.convolutions:
                remedy = "prune ffn or heads"
                raise RecipeError("channels: the model has no convolutions", found=card.name, remedy=remedy)
            return  # which of them go together only the model's graph says
        sheet = self._sheet(card)
        self._check_steps(sheet.pools)
        self._planned(sheet)

    def after(self, card: ModelCard) -> ModelCard:
        if "channels" in self.parts:
            return replace(card, parameters=round(card.parameters * self._expected_share))
        sheet = self._sheet(card)
        return sheet.after(self._planned(sheet))

    def work_bytes(self, card: ModelCard) -> int:
        copies = 2 * card.parameters if self.latency is not None else 0
        if self.importance in ("magnitude", "random", "activation"):
            return 4 * copies
        # What layers and the functions between them keep for the gradients, and the logits.
        widths = sum(out + inputs for name, (out, inputs) in card.linears.items() if name != "lm_head")
        logits = 5 * card.vocab_size if "task:causal-lm" in card.tags else 0
        return 4 * max(copies, min(_SAMPLE, card.max_length) * (2 * widths + logits))

    def forward_passes(self) -> float:
        passes = {"magnitude": 0.0, "random": 0.0, "activation": 1.0}.get(self.importance, 3.0)
        # Eight trials of seven rounds, in which two models run on four of 128 samples.
        return passes + (3.5 if self.latency is not None else 0.0)

    def apply(self, model: Model, context: TransformContext) -> Model:
        from optkit.shapes import describe
        from optkit_prune.structured.cutting import cut, name_head_size
        from optkit_prune.structured.importance import Ranking, scores_of

        module: Any = model.module
        example, before = _example(model, context), _size(module)
        context.progress(0, 1, "graph of dependencies")
        structures = self._structures(module, example)
        pools = [structure.pool for structure in structures]
        self._check_steps(pools)
        language = "task:causal-lm" in model.tags
        scores = scores_of(self.importance, module, structures, context, language=language, seed=self.seed)
        relative = self.importance not in ("taylor", "hessian")
        ranking = Ranking(structures, scores, across=self.allocation == "global", relative=relative)
        kept = self._kept(module, ranking, example, context)
        cut(module, structures, ranking.gone(kept), example)
        had, left = totals(pools, whole(pools)), totals(pools, kept)
        told = ", ".join(f"{part} {had[part]} -> {left[part]}" for part in left)
        context.progress(1, 1, f"{told}; parameters {before} -> {_size(module)}")
        tags = self.provides()
        if hasattr(module, "config"):
            name_head_size(module, self.parts)
            describe(module)
            tags |= {"shape:pruned"} if hasattr(module.config, SHAPES_ENTRY) else set()
        return model.tagged(*tags)

    @property
    def _expected_share(self) -> float:
        """About the share of the parameters that stays where channels go: each weight lies between two pools."""
        if self.ratio is not None:
            return (1 - self.ratio) ** 2
        budget = self.parameters or self.flops or self.latency or ""
        share = number_of(budget)
        return share if share is not None and budget.endswith("%") else 1.0

    def _sheet(self, card: ModelCard) -> Sheet:
        return sheet_of(card, self.parts, round_to=self._step, kv_groups=self.kv_groups)

    def _structures(self, module: nn.Module, example: Batch) -> list[Structure]:
        from optkit_prune.structured.graph import structures_of

        return structures_of(module, self.parts, example, round_to=self._step, kv_groups=self.kv_groups)

    def _planned(self, sheet: Sheet) -> Kept:
        """What is going to stay, as far as a card tells."""
        if self.latency is None:
            return self._within(sheet.pools, sheet.cost(flops=self.flops is not None), lambda kept: kept)
        # As if time were in proportion to multiplications.
        cost, pools = sheet.cost(flops=True), sheet.pools
        limit = (number_of(self.latency) or 0) * cost.of(whole(pools))
        share = smallest_share(pools, lambda share: cost.of(by_share(pools, share)) <= limit)
        return by_share(pools, MOST if share is None else share)

    def _kept(self, module: nn.Module, ranking: Ranking, example: Batch, context: TransformContext) -> Kept:
        from optkit_prune.structured.structures import cost_of

        if self.latency is not None:
            return self._timed(module, ranking, example, context)
        cost = cost_of(module, ranking.structures, example, flops=self.flops is not None)
        return self._within(ranking.pools, cost, ranking.spread)

    def _within(self, pools: Sequence[Pool], cost: Cost, spread: Callable[[Kept], Kept]) -> Kept:
        """What stays within the ratio or the budget.

        Raises:
            RecipeError: too little goes for it, or too much, or nothing of a part.
        """
        if self.ratio is not None:
            return spread(by_ratio(pools, self.ratio))
        name, budget = next((name, value) for name in _BUDGETS if (value := getattr(self, name)) is not None)
        now = cost.of(whole(pools))
        limit = (number_of(budget) or 0) * (now if budget.endswith("%") else 1)
        if limit >= now:
            raise RecipeError(f"{name}: the model has {now:.0f} already", found=budget, remedy="lower it")
        share = smallest_share(pools, lambda share: cost.of(spread(by_share(pools, share))) <= limit)
        if share is None:
            least = cost.of(spread(by_share(pools, MOST)))
            what = f"{name}: with the least of {' and '.join(self.parts)} it keeps {least / now:.0%} ({least:.0f})"
            raise RecipeError(what, found=budget, remedy="raise it, prune more parts, or lower round_to")
        kept = spread(by_share(pools, share))
        self._check_parts(pools, kept, name, budget)
        return kept

    def _timed(self, module: nn.Module, ranking: Ranking, example: Batch, context: TransformContext) -> Kept:
        """What stays where a run takes no more than the share of the time.

        Raises:
            RecipeError: no ratio makes it as fast, or a part stays whole.
        """
        from optkit_prune.structured.cutting import cut
        from optkit_prune.structured.latency import time_ratio

        assert self.latency is not None
        limit = number_of(self.latency) or 0
        batches = context.calibration.inputs
        if not batches:
            raise OptkitError("there is no calibration data", remedy="give it in TransformContext.calibration")
        taken: dict[float, float] = {}

        def fits(share: float) -> bool:
            context.progress(len(taken), len(taken) + 1, f"time without {share:.1%} of each part")
            pruned = copy.deepcopy(module)
            gone = ranking.gone(ranking.spread(by_share(ranking.pools, share)))
            cut(pruned, self._structures(pruned, example), gone, example)
            taken[share] = time_ratio(pruned, module, batches, context.device)
            return taken[share] <= limit

        share = smallest_share(ranking.pools, fits)
        if share is None:
            what = (
                f"latency: with the least of {' and '.join(self.parts)} it takes {min(taken.values()):.0%} of the time"
            )
            raise RecipeError(what, found=self.latency, remedy="raise it, prune more parts, or lower round_to")
        kept = ranking.spread(by_share(ranking.pools, share))
        self._check_parts(ranking.pools, kept, "latency", self.latency)
        return kept

    def _check_steps(self, pools: Sequence[Pool]) -> None:
        """Refuse, before the work, what no step could do."""
        if self.ratio is not None:
            by_ratio(pools, self.ratio)
        for pool in pools:
            if pool.step > pool.units:
                what = f"round_to: {pool.key} has {pool.units} and would keep a multiple of {pool.step}"
                raise RecipeError(what, found=self._step, remedy="lower it")

    def _check_parts(self, pools: Sequence[Pool], kept: Kept, name: str, budget: str) -> None:
        had, left = totals(pools, whole(pools)), totals(pools, kept)
        untouched = [part for part in left if left[part] == had[part]]
        if untouched:
            what = f"{name}: is reached before a step of {untouched[0]} has to go"
            raise RecipeError(what, found=budget, remedy=f"lower it, or leave {untouched[0]} out of parts")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _example(model: Model, context: TransformContext) -> dict[str, Tensor]:
    """A small batch: the start of a text, or two rows of anything else."""
    import torch

    if context.calibration.inputs:
        batch = context.calibration.inputs[0]
        if "input_ids" in batch:
            return {name: value[:1, :32] for name, value in batch.items()}
        return {name: value[:2] for name, value in batch.items()}
    module: Any = model.module
    if not hasattr(module, "config"):
        raise OptkitError("there is no calibration data", remedy="give it in TransformContext.calibration")
    ids = torch.arange(8)[None] % module.config.vocab_size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
