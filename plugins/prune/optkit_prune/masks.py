"""What pruning on a mask has in common: how many weights of which layers, and exactly so many of the lowest scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, field_validator, model_validator

from optkit.errors import OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.targets import select
from optkit.transforms import Transform, TransformContext
from optkit_prune.patterns import QUANTIZED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.blockwise import Block

__all__ = ["Masked", "checked", "input_norms", "lowest", "lowest_of_each", "prune_lowest", "spread"]


class Masked(Transform):
    """Sets weights of linear layers to zero, each layer by a mask. Shapes stay as they are.

    The number of weights taken is exact: of a layer of `n` weights, `round(sparsity * n)`, or `M - N` of each group of
    a pattern. Those that are zero already are taken first; where a row or a group has more of them than its part, the
    layer ends with more zeros.
    """

    requires = frozenset({"weights:float"})
    conflicts = QUANTIZED | {"sparsity:*"}

    sparsity: float | None = Field(default=None, gt=0, le=0.95)
    """Share of zeros in each layer. Give this or `pattern`."""
    pattern: str | None = None
    """`N:M`, such as `2:4`: of every M consecutive input features, N keep their weights. M divides every layer's input
    features."""
    targets: tuple[str, ...] = ("Linear",)
    """Layers to prune: `Linear` for all linear layers, exact module paths, or patterns that start with `re:`."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave dense, spelt like `targets`."""

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            found = re.fullmatch(r"([1-9]\d{0,2}):([1-9]\d{0,2})", pattern)
            if found is None or int(found[1]) >= int(found[2]):
                raise ValueError("a pattern is N:M with N below M, such as 2:4")
        return pattern

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("exactly one amount is needed; give sparsity or pattern")
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """N and M of the pattern."""
        if self.pattern is None:
            return None
        kept, size = self.pattern.split(":")
        return int(kept), int(size)

    def provides(self) -> frozenset[str]:
        return frozenset({f"sparsity:{self.pattern or 'unstructured'}"})

    def check(self, card: ModelCard) -> None:
        for name in select(card.linears, self.targets, self.ignore):
            outputs, inputs = card.linears[name]
            if self.group is None and not self.zeros(outputs * inputs):
                raise RecipeError(
                    f"sparsity rounds to none of the {outputs * inputs} weights of {name}",
                    found=self.sparsity,
                    remedy="raise it, or add the layer to ignore",
                )
            if self.group is not None and inputs % self.group[1]:
                raise RecipeError(
                    f"pattern does not divide the {inputs} input features of {name}",
                    found=self.pattern,
                    remedy="choose another M, or add the layer to ignore",
                )

    def chosen(self, module: nn.Module) -> dict[str, nn.Linear]:
        """The layers to prune, by path, in the model's order."""
        import torch

        linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
        return {name: linears[name] for name in select(linears, self.targets, self.ignore)}

    def zeros(self, weights: int) -> int:
        """How many of so many weights become zero, where there is no pattern."""
        assert self.sparsity is not None
        return round(self.sparsity * weights)


def prune_lowest(pruner: Masked, model: Model, context: TransformContext, score: Callable[[Tensor], Tensor]) -> Model:
    """Set to zero what scores lowest in each chosen layer, or with a pattern in each group, without data.

    Args:
        pruner: which layers, and how many weights.
        model: changed in place.
        context: for progress.
        score: of a layer's weights `[out, in]` float32, in their shape.

    Raises:
        OptkitError: a weight is not finite.
    """
    chosen = pruner.chosen(model.module)
    for done, (name, layer) in enumerate(chosen.items()):
        context.progress(done, len(chosen), name)
        scores = score(checked(layer.weight, name))
        if pruner.group is None:
            mask = lowest(scores.reshape(1, -1), [pruner.zeros(scores.numel())]).reshape(scores.shape)
        else:
            mask = lowest_of_each(scores, pruner.group)
        layer.weight.data[mask] = 0
    context.progress(len(chosen), len(chosen), "done")
    return model.tagged(*pruner.provides())


def input_norms(block: Block) -> dict[str, Tensor]:
    """The L2 norm of each input feature of the chosen layers of a block, over all calibration data.

    Returns:
        By layer `[features]` float32.

    Raises:
        OptkitError: a layer gets no input, or one that is not finite.
    """
    sums: dict[str, Tensor] = {}

    def see(name: str, input: Tensor) -> None:
        squares = input.detach().reshape(-1, input.shape[-1]).double().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    block.watch(block.names, see)
    for name in block.names:
        if name not in sums:
            raise OptkitError("no calibration data reaches this layer", where=name, remedy="add it to ignore")
        if not sums[name].isfinite().all():
            raise OptkitError(
                "its inputs on the calibration data are not finite",
                where=name,
                remedy="check the model, and the transforms before this one",
            )
    return {name: total.sqrt().float() for name, total in sums.items()}


def checked(weight: Tensor, name: str) -> Tensor:
    """A layer's weights as float32, without gradients.

    Raises:
        OptkitError: a weight is not finite; with the layer's `name`.
    """
    if not weight.isfinite().all():
        raise OptkitError("a weight is not finite, so it cannot be pruned", where=name)
    return weight.detach().float()


def lowest(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """A mask of exactly so many of the lowest scores in each row; of equal ones, the first.

    Args:
        scores: `[rows, n]` float, without NaN.
        counts: how many, one for each row.

    Returns:
        `[rows, n]` bool.
    """
    import torch

    # By rank, not by threshold: ties at the threshold would prune too many.
    order = scores.argsort(dim=-1, stable=True)
    wanted = torch.arange(scores.shape[1], device=scores.device) < torch.tensor(counts, device=scores.device)[:, None]
    return torch.zeros_like(wanted).scatter_(1, order, wanted)


def lowest_of_each(scores: Tensor, group: tuple[int, int]) -> Tensor:
    """A mask of all but the N highest scores in every M consecutive features.

    Args:
        scores: `[out, in]` float; M divides `in`.
        group: N and M.

    Returns:
        `[out, in]` bool.
    """
    kept, size = group
    groups = scores.reshape(-1, size)
    return lowest(groups, [size - kept] * len(groups)).reshape(scores.shape)


def spread(total: int, parts: int) -> list[int]:
    """A number as the sum of so many that differ by 1 at most, the larger ones spread evenly."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]
