"""Random pruning: the control that every other pruner has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from optkit.model import Model
from optkit.transforms import TransformContext
from optkit_prune.masks import Masked, prune_lowest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Random"]


class Random(Masked):
    """Pruning on a mask: weights chosen by chance become zero, exactly as many as other pruners take.

    Costs 17 s of one core for 135 M parameters, and no data. It is the control in a comparison: what another pruner
    loses less than this is what its choice is worth. Not for use: at 50%, SmolLM2-135M's perplexity was 1.3e8.

    Paper: Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv:2202.02643.
    """

    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Of the random numbers. The same seed prunes the same weights of the same layers, on every machine."""

    def apply(self, model: Model, context: TransformContext) -> Model:
        import torch

        generator = torch.Generator().manual_seed(self.seed)

        def score(weight: Tensor) -> Tensor:
            # What is zero already comes first, or there would be more zeros than asked for.
            return torch.rand(weight.shape, generator=generator).masked_fill(weight == 0, -1)

        return prune_lowest(self, model, context, score)
