"""Low rank: a linear layer becomes the product of two thin ones that keeps its outputs on calibration data."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from optkit.errors import OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.targets import select
from optkit.transforms import Transform, TransformContext
from optkit_prune.patterns import QUANTIZED
from optkit_prune.ranks import allocate, largest_rank, rank_for

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.shapes import LowRankLinear

__all__ = ["SVD", "principal", "root_of"]

Shapes = Mapping[str, tuple[int, int]]


class SVD(Transform):
    """Linear layers as products of two thin ones, whose outputs on calibration data are as close as the rank allows.

    The weight is truncated where its outputs have least energy: by the singular values of `W S`, with `S` the Cholesky
    factor of `X^T X` (whitening), which is the best choice for the data that a layer gets. Without `whiten` the weight
    alone decides, which would be the best if input features did not depend on each other: a control.

    Costs two runs of the model on calibration data, four with a budget in `parameters`, and a singular value
    decomposition in float64 for each layer: 0.3 s for 576 x 1536 on one core. A product of rank `r` only saves where
    `r` is below `out * in / (out + in)`, and trained weights are of high rank: small models need `prune.recover` next.
    Not for a few percent: two kernels may take longer than the one that they replace.

    Layers that would not shrink stay as they are, and the log says how many. Comes before quantization, which then
    quantizes both factors: choose `round_to` so that the group size divides it.

    Papers: Wang et al., SVD-LLM, arXiv:2403.07378, for whitening; a layer's inputs here are those that the truncated
    layers before it give. The factors `U_r` and `U_r^T W`, with `U_r` the left singular vectors of `W S`, are the
    paper's without the inverse of `S`.
    """

    requires = frozenset({"weights:float"})
    # Ranked by zeros, and a product of two thin matrices would have none.
    conflicts = QUANTIZED | {"sparsity:*", "pruned:rank"}

    energy: float | None = Field(default=None, gt=0, lt=1)
    """Share of the squared singular values that each layer keeps at least. Give this, `ratio` or `parameters`."""
    ratio: float | None = Field(default=None, gt=0, le=0.95)
    """Share of each layer's weights that goes, at least: ranks are rounded down."""
    parameters: int | None = Field(default=None, gt=0)
    """Most parameters of the whole model. Ranks are chosen so that the shares of energy that layers lose add up to
    little; layers that need all of it stay whole."""
    whiten: bool = True
    """Keep the outputs on calibration data, not the weights."""
    round_to: int = Field(default=16, ge=1, le=4096)
    """Ranks are multiples of it, as kernels like them."""
    targets: tuple[str, ...] = ("Linear",)
    """Layers to factor: `Linear` for all linear layers, exact module paths, or patterns that start with `re:`."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave whole, spelt like `targets`."""

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if sum(amount is not None for amount in (self.energy, self.ratio, self.parameters)) != 1:
            raise ValueError("exactly one amount is needed; give energy, ratio or parameters")
        return self

    @property
    def calibration(self) -> bool:  # type: ignore[override]  # whether it learns from data is a matter of its options
        return self.whiten

    def provides(self) -> frozenset[str]:
        return frozenset({"pruned:rank", "shape:pruned"})

    def check(self, card: ModelCard) -> None:
        self._check(self._planned(card), card.parameters, tied=card.tied_head)

    def after(self, card: ModelCard) -> ModelCard:
        shapes = self._planned(card)
        ranks = self._expected(shapes, card.parameters)
        linears: dict[str, tuple[int, int]] = {}
        for name, (out, inputs) in card.linears.items():
            if name in ranks:
                linears |= {f"{name}.0": (ranks[name], inputs), f"{name}.1": (out, ranks[name])}
            else:
                linears[name] = (out, inputs)
        saved = sum(math.prod(shapes[name]) - rank * sum(shapes[name]) for name, rank in ranks.items())
        return replace(card, linears=linears, parameters=self.parameters or card.parameters - saved)

    def work_bytes(self, card: ModelCard) -> int:
        shapes = [shape for name, shape in card.linears.items() if name != "lm_head"]
        out, inputs = max(out for out, _ in shapes), max(inputs for _, inputs in shapes)
        # X^T X and its root; the weight and its singular vectors, with room for the decompositions: float64.
        roots = 3 * inputs * inputs if self.whiten else 0
        return 8 * (roots + 8 * out * inputs)

    def forward_passes(self) -> float:
        # The decompositions of SmolLM2's layers take half as long as a run on 64,000 tokens.
        walks = 1 if self.parameters is None else 2
        return 2.5 * walks if self.whiten else 0.0

    def apply(self, model: Model, context: TransformContext) -> Model:
        import torch

        from optkit.quantized import replace_module

        module: Any = model.module
        linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
        layers = {name: linears[name] for name in select(linears, self.targets, self.ignore)}
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        before = _size(module)
        self._check(shapes, before, tied=getattr(getattr(module, "config", None), "tie_word_embeddings", False))
        able = self._able(shapes)
        budgeted = self._budgeted(module, context, able, before) if self.parameters is not None else None
        for name, root in self._roots(module, context, able if budgeted is None else budgeted):
            vectors, squares = principal(layers[name].weight, root, name)
            rank = self._rank(shapes[name], squares) if budgeted is None else budgeted[name]
            if rank is not None:
                replace_module(module, name, _low_rank(layers[name], vectors[:, :rank]))
        whole = sum(isinstance(module.get_submodule(name), torch.nn.Linear) for name in layers)
        if whole == len(layers):
            what, remedy = f"none of {whole} layers would shrink", "lower energy, or choose other targets"
            raise RecipeError(what, found=self.energy, remedy=remedy)
        left = f"; {whole} that would not shrink stay as they are" if whole else ""
        told = f"{len(layers) - whole} of {len(layers)} layers factored, {before} parameters -> {_size(module)}{left}"
        context.progress(len(layers), len(layers), told)
        return model.tagged(*self.provides())

    def _planned(self, card: ModelCard) -> dict[str, tuple[int, int]]:
        return {name: card.linears[name] for name in select(card.linears, self.targets, self.ignore)}

    def _able(self, shapes: Shapes) -> dict[str, tuple[int, int]]:
        """The layers that shrink at some rank."""
        return {name: shape for name, shape in shapes.items() if largest_rank(shape, self.round_to)}

    def _check(self, shapes: Shapes, parameters: int, *, tied: bool) -> None:
        """Refuse what no ranks could reach.

        Raises:
            RecipeError: with what could be.
        """
        able = self._able(shapes)
        if tied and "lm_head" in shapes:
            what = "lm_head is tied to the embedding, which stays as large as it is"
            raise RecipeError(what, remedy="add lm_head to ignore")
        if not able:
            what = f"round_to: with ranks of its multiples none of {len(shapes)} layers would shrink"
            raise RecipeError(what, found=self.round_to, remedy="lower it, or choose other targets")
        if self.ratio is not None:
            none = [name for name, shape in shapes.items() if not rank_for(shape, self.ratio, self.round_to)]
            if none:
                out, inputs = shapes[none[0]]
                what = f"ratio leaves no multiple of {self.round_to} as the rank of {none[0]}, {out} x {inputs}"
                raise RecipeError(what, found=self.ratio, remedy="lower it or round_to, or add the layer to ignore")
        if self.parameters is not None:
            least = parameters - sum(math.prod(shape) - self.round_to * sum(shape) for shape in able.values())
            if not least <= self.parameters < parameters:
                what = f"parameters: the model has {parameters}, and with the lowest ranks {least}"
                raise RecipeError(what, found=self.parameters, remedy="choose between them, or other targets")

    def _expected(self, shapes: Shapes, parameters: int) -> dict[str, int]:
        """The ranks of layers as far as shapes tell: exact for a `ratio`, without those that would not shrink.

        Where singular values decide, odd multiples of `round_to`, so that planning refuses a group size that does not
        divide every rank.
        """
        able = self._able(shapes)
        if self.ratio is not None:
            return {name: rank_for(shape, self.ratio, self.round_to) for name, shape in able.items()}
        kept = 1.0
        if self.parameters is not None:
            kept -= (parameters - self.parameters) / sum(math.prod(shape) for shape in able.values())
        ranks: dict[str, int] = {}
        for name, shape in able.items():
            rank = min(largest_rank(shape, self.round_to), rank_for(shape, 1 - kept, self.round_to))
            even = rank // self.round_to % 2 == 0
            ranks[name] = max(rank - even * self.round_to, self.round_to)
        return ranks

    def _rank(self, shape: tuple[int, int], squares: Tensor) -> int | None:
        """The rank that `energy` or `ratio` gives a layer, None if it stays whole."""
        if self.ratio is not None:
            return rank_for(shape, self.ratio, self.round_to)
        assert self.energy is not None
        needed = 1 + int((squares.cumsum(0) < self.energy * squares.sum()).sum())
        rank = -(-needed // self.round_to) * self.round_to
        return rank if rank <= largest_rank(shape, self.round_to) else None

    def _budgeted(self, module: nn.Module, context: TransformContext, able: Shapes, parameters: int) -> dict[str, int]:
        """The ranks within the budget, by the singular values of the model as it is; without layers that stay whole."""
        assert self.parameters is not None
        stage = replace(context, checkpoint=context.checkpoint.within("spectra"))
        squares: dict[str, Tensor] = {}
        for name, root in self._roots(module, stage, able):
            layer: Any = module.get_submodule(name)
            squares[name] = principal(layer.weight, root, name)[1].cpu()
            # Before the walk says that the block is done.
            stage.checkpoint.save(name, {"squares": squares[name]})
        for name in able.keys() - squares.keys():
            kept = stage.checkpoint.load(name)
            assert kept is not None
            squares[name] = kept[0]["squares"]
        step = self.round_to
        ranks = {name: range(step, largest_rank(shape, step) + 1, step) for name, shape in able.items()}
        # The last option is the layer as it is.
        costs = [[*(rank * sum(able[name]) for rank in ranks[name]), math.prod(able[name])] for name in able]
        losses = [[*_lost(squares[name], ranks[name]), 0.0] for name in able]
        limit = self.parameters - (parameters - sum(math.prod(shape) for shape in able.values()))
        picks = zip(able, allocate(costs, losses, limit), strict=True)
        return {name: ranks[name][pick] for name, pick in picks if pick < len(ranks[name])}

    def _roots(
        self, module: nn.Module, context: TransformContext, names: Collection[str]
    ) -> Iterator[tuple[str, Tensor | None]]:
        """Each layer with the factor by which its weight is whitened, in the model's order."""
        from optkit.blockwise import walk
        from optkit.hessians import Hessians

        if not self.whiten:
            for done, name in enumerate(names):
                context.progress(done, len(names), name)
                yield name, None
            return
        for block in walk(module, context, names):
            hessians = Hessians()
            block.watch(block.names, hessians.see)
            for sharing in hessians.sharing(block.names):
                root = root_of(hessians.of(sharing[0]))
                for name in sharing:
                    yield name, root


def root_of(covariance: Tensor) -> Tensor:
    """A matrix `S` with `S S^T = C`: Cholesky's factor, or where inputs have too few directions for it, the symmetric
    root.

    Args:
        covariance: `C`, `[in, in]` float, symmetric and positive semidefinite.

    Returns:
        `[in, in]` float64.
    """
    import torch

    exact = covariance.double()
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(exact)
    if info == 0 and torch.isfinite(lower).all():
        return lower
    values, vectors = torch.linalg.eigh(exact)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def principal(weight: Tensor, root: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """The directions of a layer's outputs, by falling energy.

    Args:
        weight: `[out, in]` float.
        root: `[in, in]` float64, a root of the inputs' covariance; None for inputs that do not depend on each other.
        name: the layer, for errors.

    Returns:
        Orthonormal columns `[out, min(out, in)]` and their energies `[min(out, in)]`, float64.

    Raises:
        OptkitError: a weight is not finite.
    """
    import torch

    if not weight.isfinite().all():
        raise OptkitError("a weight is not finite, so it cannot be factored", where=name)
    exact = weight.detach().double()
    vectors, values, _ = torch.linalg.svd(exact if root is None else exact @ root, full_matrices=False)
    return vectors, values.square()


def _low_rank(layer: nn.Linear, vectors: Tensor) -> LowRankLinear:
    """The layer, its outputs without bias projected onto orthonormal columns `[out, rank]` float64."""
    import torch
    from torch import nn

    from optkit.shapes import LowRankLinear

    weight, rank = layer.weight, vectors.shape[1]
    first = nn.Linear(layer.in_features, rank, bias=False, device="meta")
    second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None, device="meta")
    projected = (vectors.T @ weight.detach().double()).to(weight.dtype)
    with torch.no_grad():
        first.weight = nn.Parameter(projected, requires_grad=False)
        second.weight = nn.Parameter(vectors.to(weight.dtype).contiguous(), requires_grad=False)
    if layer.bias is not None:
        second.bias = layer.bias
    return LowRankLinear(first, second)


def _lost(squares: Tensor, ranks: Iterable[int]) -> list[float]:
    """The share of the energy beyond each rank."""
    left = squares.flip(0).cumsum(0).flip(0) / squares.sum().clamp_min(1e-300)
    return [float(left[rank]) for rank in ranks]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
