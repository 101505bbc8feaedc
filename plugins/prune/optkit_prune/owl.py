"""OWL: blocks of a model whose inputs and weights have more outliers keep more of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.transforms import TransformContext
from optkit_prune.masks import Masked, checked, input_norms

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Allocated", "outlier_ratio", "sparsities"]


class Allocated(Masked):
    """Pruning on a mask that learns from calibration data, and may take more weights from some blocks than from others.

    Paper: Yin et al., Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
    Sparsity, arXiv:2310.05175.
    """

    calibration: ClassVar[bool] = True

    allocation: Literal["uniform", "owl"] = "uniform"
    """`uniform`: every layer gets the same sparsity. `owl`: a block of layers gets less the more outliers it has, and
    the whole exactly as many zeros as with `uniform` but for rounding; it goes with `sparsity`, and pays above 50%."""
    owl_threshold: float = Field(default=5.0, gt=1)
    """Of `owl`: a weight is an outlier if its magnitude times the norm of its input is above this many times the mean
    of its block."""
    owl_spread: float = Field(default=0.08, gt=0, lt=0.5)
    """Of `owl`: twice this lies between the sparsities of the blocks with the most and with the fewest outliers."""

    @model_validator(mode="after")
    def _allocates(self) -> Self:
        if self.allocation == "uniform":
            return self
        if self.sparsity is None:
            raise ValueError("allocation: owl goes with sparsity, a pattern takes as much everywhere")
        low, high = self.sparsity - 2 * self.owl_spread, self.sparsity + 2 * self.owl_spread
        if low < 0 or high >= 1:
            raise ValueError(
                f"owl_spread lets blocks reach sparsities from {low:.2f} to {high:.2f}; lower it to below "
                f"{min(self.sparsity, 1 - self.sparsity) / 2:.3g}"
            )
        return self

    def check(self, card: ModelCard) -> None:
        super().check(card)
        if self.allocation == "owl" and card.layers < 2:
            raise RecipeError(
                "allocation: owl shares zeros out among blocks that follow each other",
                found=f"{card.layers} in the model",
                remedy="use uniform",
            )

    def forward_passes(self) -> float:
        return 3.0 if self.allocation == "owl" else 2.0

    def allocated(self, model: Model, context: TransformContext) -> dict[str, int]:
        """How many weights of each chosen layer become zero, where there is no pattern.

        What is in no block, a head, gets the sparsity asked for. With `owl` the model is run on the calibration data,
        and all layers together get exactly `round(sparsity * n)` zeros of their `n` weights.

        Raises:
            OptkitError: a weight or an input is not finite, a layer gets no input, or the layers are not in several
                blocks.
        """
        if self.allocation == "uniform":
            return {name: self.zeros(layer.weight.numel()) for name, layer in self.chosen(model.module).items()}
        kept = context.checkpoint.load("allocation")
        if kept is not None:
            return dict(kept[1]["zeros"])
        zeros = self._by_outliers(model, context)
        context.checkpoint.save("allocation", {}, {"zeros": zeros})
        return zeros

    def _by_outliers(self, model: Model, context: TransformContext) -> dict[str, int]:
        from optkit.blockwise import walk

        assert self.sparsity is not None
        chosen = self.chosen(model.module)
        sizes = {name: layer.weight.numel() for name, layer in chosen.items()}
        blocks: list[tuple[str, ...]] = []
        ratios: list[float] = []
        outside: tuple[str, ...] = ()
        # Without a checkpoint: the blocks of this run are those of the model that came, and the next one starts anew.
        alone = replace(context, checkpoint=Checkpoint())
        for block in walk(model.module, alone, list(sizes), changed=False):
            if not block.path:
                outside = block.names
                continue
            weights = {name: checked(chosen[name].weight, name) for name in block.names}
            norms = input_norms(block)
            scores = [(weights[name].abs() * norms[name]).flatten() for name in block.names]
            blocks.append(block.names)
            ratios.append(outlier_ratio(scores, self.owl_threshold))
        if len(blocks) < 2:
            raise OptkitError(
                "allocation: owl shares zeros out among blocks that follow each other",
                found=f"{len(blocks)} with layers to prune",
                remedy="use uniform, or give more targets",
            )
        within = [sum(sizes[name] for name in names) for names in blocks]
        shares = dict.fromkeys(outside, self.sparsity)
        for names, share in zip(blocks, sparsities(ratios, within, self.sparsity, self.owl_spread), strict=True):
            shares |= dict.fromkeys(names, share)
        # The ends are rounded and not the counts, whose errors would add up.
        ends = [round(end) for end in accumulate(share * sizes[name] for name, share in shares.items())]
        ends[-1] = self.zeros(sum(sizes.values()))
        return {name: end - start for name, (start, end) in zip(shares, pairwise([0, *ends]), strict=True)}


def outlier_ratio(scores: Sequence[Tensor], threshold: float) -> float:
    """The share of scores that are above `threshold` times the mean of all.

    Args:
        scores: of the layers of a block, `[n]` float32 each, 0 or more.
        threshold: M of the paper.
    """
    count = sum(len(part) for part in scores)
    mean = sum(float(part.double().sum()) for part in scores) / count
    return sum(int((part > threshold * mean).sum()) for part in scores) / count


def sparsities(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """The sparsity of each block: the more outliers, the lower; on average over all weights `sparsity`.

    Args:
        ratios: share of outliers of each block.
        sizes: weights of each block.
        sparsity: 0 to 1.
        spread: lambda of the paper; the highest and the lowest sparsity are twice as far apart, unless all ratios are
            the same.
    """
    low, high = min(ratios, default=0), max(ratios, default=0)
    density = [2 * spread * (ratio - low) / (high - low) if high > low else 0.0 for ratio in ratios]
    mean = sum(part * size for part, size in zip(density, sizes, strict=True)) / max(sum(sizes), 1)
    return [sparsity + mean - part for part in density]
