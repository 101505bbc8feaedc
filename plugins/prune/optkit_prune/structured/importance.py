"""How much a model would miss each unit of a pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.conv import _ConvNd

from optkit.blockwise import output_of, walk
from optkit.errors import OptkitError
from optkit.transforms import TransformContext
from optkit_prune.masks import lowest
from optkit_prune.structured.pools import Kept, Pool, totals
from optkit_prune.structured.structures import Cut, Structure, masked, tensors_of

__all__ = ["Ranking", "scores_of"]

_KEEP_EVERY = 16

Scores = Mapping[str, Tensor]
Batch = Mapping[str, Tensor]


def scores_of(
    kind: str,
    module: nn.Module,
    structures: Sequence[Structure],
    context: TransformContext,
    *,
    language: bool,
    seed: int,
) -> dict[str, Tensor]:
    """The importance of every unit.

    Args:
        kind: `magnitude`, `taylor`, `activation`, `hessian` or `random`.
        module: on the CPU.
        structures: of it.
        context: calibration data, for all but magnitude and random.
        language: whether the gradients are those of the loss of the next token.
        seed: of `random`, and of the directions in which other outputs are watched.

    Returns:
        By pool `[units]` float32.

    Raises:
        OptkitError: there is no calibration data, or a number is not finite.
    """
    match kind:
        case "random":
            generator = torch.Generator().manual_seed(seed)
            found = {
                structure.pool.key: torch.rand(structure.pool.units, generator=generator) for structure in structures
            }
        case "magnitude":
            found = {structure.pool.key: _magnitude(module, structure) for structure in structures}
        case "activation":
            found = _activation(module, structures, context)
        case _:
            power = 1 if kind == "taylor" else 2
            found = _gradients(module, structures, context, power, language=language, seed=seed)
    for key, scores in found.items():
        if not scores.isfinite().all():
            what, remedy = "its importances are not finite", "check the model, and the transforms before this one"
            raise OptkitError(what, where=key, remedy=remedy)
    return found


def _sums(structure: Structure, values: Tensor, cut: Cut) -> Tensor:
    """Sums over the entries of each unit `[units]` of values by place along a cut's side."""
    return torch.zeros(structure.pool.units).index_add_(0, cut.units, values.float().cpu()[cut.places])


def _magnitude(module: nn.Module, structure: Structure) -> Tensor:
    """The L2 norm of all weights that go with a unit."""
    total = torch.zeros(structure.pool.units)
    for cut in structure.cuts:
        for path, axis in tensors_of(module, cut).items():
            squares = module.get_parameter(path).detach().float().square()
            total += _sums(structure, squares.movedim(axis, 0).flatten(1).sum(1) if squares.dim() > 1 else squares, cut)
    return total.sqrt()


def _activation(module: nn.Module, structures: Sequence[Structure], context: TransformContext) -> dict[str, Tensor]:
    """Magnitudes of the weights that read a unit, times the norms of what they read (Wanda, arXiv:2306.11695)."""
    readers = {cut.path for structure in structures for cut in structure.readers}
    names = [name for name, _ in module.named_modules() if name in readers]
    squares: dict[str, Tensor] = {}

    def see(name: str, input: Tensor) -> None:
        axis = 1 if isinstance(module.get_submodule(name), _ConvNd) else -1
        sums = input.detach().double().square().movedim(axis, 0).flatten(1).sum(1).cpu()
        squares[name] = squares[name] + sums if name in squares else sums

    for block in walk(module, context, names, changed=False):
        block.watch(block.names, see)
        for name in block.names:
            # Before the walk says that the block is done.
            context.checkpoint.save(f"inputs-{name}", {"squares": squares[name]})
    for name in names:
        if name not in squares:
            kept = context.checkpoint.load(f"inputs-{name}")
            assert kept is not None
            squares[name] = kept[0]["squares"]
    found: dict[str, Tensor] = {}
    for structure in structures:
        total = torch.zeros(structure.pool.units)
        for cut in structure.readers:
            [(path, axis)] = tensors_of(module, cut).items()
            sizes = module.get_parameter(path).detach().abs().double().movedim(axis, 0).flatten(1).sum(1)
            total += _sums(structure, sizes * squares[cut.path].sqrt(), cut)
        found[structure.pool.key] = total
    return found


def _gradients(
    module: Any,
    structures: Sequence[Structure],
    context: TransformContext,
    power: int,
    *,
    language: bool,
    seed: int,
) -> dict[str, Tensor]:
    """Means over the batches of the gradients by a factor on each unit, in absolute value or squared.

    Where no token is predicted, the loss is the output times random signs. Its squared gradient is on average the
    diagonal of the Gauss-Newton Hessian of the squared distance from the output as it is.
    """
    batches = context.calibration.inputs
    if not batches:
        raise OptkitError("there is no calibration data", remedy="give it in TransformContext.calibration")
    sums = {structure.pool.key: torch.zeros(structure.pool.units) for structure in structures}
    kept = context.checkpoint.load("gradients")
    finished = 0
    if kept is not None:
        sums, finished = dict(zip(sums, (kept[0][str(i)] for i in range(len(sums))), strict=True)), kept[1]["batches"]
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(False).to(context.device)
    try:
        for done, batch in list(enumerate(batches))[finished:]:
            context.progress(done, len(batches), "gradients")
            masks = {
                s.pool.key: torch.ones(s.pool.units, device=context.device, requires_grad=True) for s in structures
            }
            moved = {name: value.to(context.device) for name, value in batch.items()}
            with torch.enable_grad(), masked(module, structures, masks):
                loss = _loss(output_of(module, moved), moved, language=language, seed=seed + done)
                gradients = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
            for key, gradient in zip(masks, gradients, strict=True):
                if gradient is None:
                    raise OptkitError("no calibration data reaches it", where=key)
                sums[key] += gradient.float().abs().pow(power).cpu()
            if (done + 1) % _KEEP_EVERY == 0:
                tensors = {str(i): total for i, total in enumerate(sums.values())}
                context.checkpoint.save("gradients", tensors, {"batches": done + 1})
    finally:
        module.to("cpu")
        for parameter, needed in wanted.items():
            parameter.requires_grad_(needed)
    return {key: total / len(batches) for key, total in sums.items()}


def _loss(output: Tensor, batch: Batch, *, language: bool, seed: int) -> Tensor:
    if language:
        return cross_entropy(output[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    signs = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (output * signs.to(output)).sum()


class Ranking:
    """Which units of a model stay, once it is known how many.

    Args:
        structures: of the model.
        scores: by pool `[units]`.
        across: whether the units of a part are ranked across all pools.
        relative: whether scores of different pools are then compared in proportion to their means.
    """

    def __init__(self, structures: Sequence[Structure], scores: Scores, *, across: bool, relative: bool) -> None:
        self.structures, self._scores = structures, scores
        self._across, self._relative = across, relative

    @property
    def pools(self) -> list[Pool]:
        """Those of the structures."""
        return [structure.pool for structure in self.structures]

    def gone(self, kept: Kept) -> dict[str, Tensor]:
        """By pool a mask of the units that go, `[units]` bool: those of the lowest scores, as many of each row."""
        masks: dict[str, Tensor] = {}
        for pool in self.pools:
            rows = self._scores[pool.key].reshape(pool.rows, -1)
            masks[pool.key] = lowest(rows, [(pool.units - kept[pool.key]) // pool.rows] * pool.rows).flatten()
        return masks

    def spread(self, kept: Kept) -> Kept:
        """As many of each part in all, where they are missed most, if units are ranked across pools; one step of each
        pool stays."""
        if not self._across:
            return kept
        spread = {pool.key: pool.step for pool in self.pools}
        for part, total in totals(self.pools, kept).items():
            pools = [pool for pool in self.pools if pool.part == part]
            left = total - sum(spread[pool.key] for pool in pools)
            for _, key, step in sorted(self._steps(pools), key=lambda choice: -choice[0]):
                if step <= left:
                    spread[key] += step
                    left -= step
            if left:
                what = f"{total} units of {part} are no sum of the steps of its layers"
                raise OptkitError(what, remedy="use allocation: uniform")
        return spread

    def _steps(self, pools: Iterable[Pool]) -> Iterator[tuple[float, str, int]]:
        """The score of each step of pools after the first, best first, with key and units."""
        for pool in pools:
            scores = self._scores[pool.key]
            if self._relative:
                scores = scores / scores.mean().clamp_min(torch.finfo(torch.float32).tiny)
            # A step takes the best that is left of every row.
            ranked = scores.reshape(pool.rows, -1).sort(descending=True).values
            width = pool.step // pool.rows
            for start in range(width, pool.most // pool.rows, width):
                yield float(ranked[:, start : start + width].mean()), pool.key, pool.step
