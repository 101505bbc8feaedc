"""GPTQ: one input feature after another is rounded, and the weights still to come make good its error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from optkit.errors import OptkitError
from optkit.model import Model
from optkit.transforms import TransformContext
from optkit_quantize.quantizer import WeightOnly, install
from optkit_quantize.rounding import grouped, least_wrong, ranges, round_with

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.quantized import WeightScheme

__all__ = ["GPTQ", "Hessians", "gptq_round"]

_SHRINKS = tuple(1 - 0.05 * step for step in range(11))
_DAMPINGS = (1, 10, 100)
_PANEL = 192


class GPTQ(WeightOnly):
    """Weight-only quantization that chooses each integer so that the layer's outputs on calibration data stay the same.

    Costs two runs of the model on the calibration data and 40 s for the rounding: two minutes of one core in all for
    135 M parameters and 16 windows of 512 tokens. Memory is that of a block and six float64 copies of its largest
    Hessian, the square of a layer's input features: about 100 MB there. With groups of 64, SmolLM2-135M's perplexity is
    1.09 times as high afterwards at 4 bits (rounded to nearest: 1.46) and 1.41 times at 3 bits (6.9). Do not use it at
    8 bits, where rounding to nearest is as good and needs no data, nor where calibration data like the model's later
    inputs cannot be had.

    Features that never have an input on the calibration data are rounded to nearest. Layers that read the same tensor
    are rounded together.

    Paper: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
    arXiv:2210.17323.
    """

    calibration: ClassVar[bool] = True

    damping: float = Field(default=0.01, gt=0, le=1)
    """Share of the Hessian's mean diagonal that is added to all of its diagonal: more trusts the calibration data less.
    Where a Hessian is still not positive definite, ten and a hundred times as much are tried."""
    block_size: int = Field(default=128, ge=1, le=4096)
    """Input features whose errors are passed on together: a matter of speed, the result is the same but for the last
    bits of sums."""
    act_order: bool = True
    """Round the features with the largest inputs first, while most others are left to make their errors good. Scales
    then come from the original weights. Groups stay in their places, so the stored format is the same."""
    scale_search: bool = True
    """Choose each scale among those of ranges shrunk by up to a half, by the error that the later weights cannot make
    good; else it covers the whole range."""

    def apply(self, model: Model, context: TransformContext) -> Model:
        from optkit.blockwise import walk

        for block in walk(model.module, context, list(self.chosen(model.module))):
            hessians = Hessians()
            block.watch(block.names, hessians.see)
            for names in hessians.sharing(block.names):
                self._quantize(model, names, hessians.of(names[0]))
        return model.tagged(*self.provides())

    def _quantize(self, model: Model, names: Iterable[str], hessian: Tensor) -> None:
        """Quantize layers of one Hessian as one: rows do not depend on each other."""
        import torch

        layers = {name: cast("nn.Linear", model.module.get_submodule(name)) for name in names}
        # By its own name, what is not finite is refused here.
        weight = torch.cat([grouped(layer.weight, self.scheme, name=name).flatten(1) for name, layer in layers.items()])
        stored, scale, zero_point = gptq_round(
            weight,
            hessian,
            self.scheme,
            damping=self.damping,
            block_size=self.block_size,
            act_order=self.act_order,
            scale_search=self.scale_search,
            name=next(iter(layers)),
        )
        start = 0
        for name, layer in layers.items():
            rows = slice(start, start + layer.out_features)
            zero = None if zero_point is None else zero_point[rows].clone()
            install(model, name, self.quantized(layer, stored[rows].clone(), scale[rows].clone(), zero))
            start = rows.stop


class Hessians:
    """The matrices `2 X^T X / n` of the inputs of linear layers, over the `n` vectors that each layer got.

    Layers that get one and the same tensor one after another, as the projections of an attention do, share one sum.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._input: Tensor | None = None
        self._readers: list[str] = []

    def see(self, name: str, input: Tensor) -> None:
        """Count in an input `[..., features]` of the layer `name`: what `Block.watch` calls."""
        if input is not self._input or name in self._readers:
            self._add()
            self._input = input
        self._readers.append(name)

    def sharing(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Layers in the order given, those of one Hessian together.

        Raises:
            OptkitError: a layer got no input.
        """
        self._add()
        together: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for name in names:
            together.setdefault(tuple(self._sums_of(name)), []).append(name)
        return [tuple(group) for group in together.values()]

    def of(self, name: str) -> Tensor:
        """The Hessian of a layer, `[features, features]` float32.

        Raises:
            OptkitError: it got no input.
        """
        self._add()
        sums = [self._sums[readers] for readers in self._sums_of(name)]
        total, vectors = sums[0][0].clone(), sum(count for _, count in sums)
        for more, _ in sums[1:]:
            total += more
        total *= 2 / vectors
        return total.triu() + total.triu(1).T

    def _sums_of(self, name: str) -> list[tuple[str, ...]]:
        found = [readers for readers in self._sums if name in readers]
        if not found:
            raise OptkitError("no calibration data reaches this layer", where=name, remedy="add it to ignore")
        return found

    def _add(self) -> None:
        """Add the last input to the sum of all that read it."""
        import torch

        if self._input is None:
            return
        vectors = self._input.detach().reshape(-1, self._input.shape[-1]).float()
        features = vectors.shape[1]
        key = tuple(self._readers)
        total, count = self._sums.get(key) or (torch.zeros(features, features, device=vectors.device), 0)
        # Only the upper triangle, panel by panel: 40% less work.
        for start in range(0, features, _PANEL):
            total[start : start + _PANEL, start:].addmm_(vectors[:, start : start + _PANEL].T, vectors[:, start:])
        self._sums[key] = total, count + len(vectors)
        self._input, self._readers = None, []


def gptq_round(
    weight: Tensor,
    hessian: Tensor,
    scheme: WeightScheme,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
    scale_search: bool = True,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight matrix so that `(w - q) H (w - q)^T` of each row stays small.

    Args:
        weight: `[out, in]` float.
        hessian: `[in, in]` float, symmetric and positive semidefinite. A feature that never has an input is rounded to
            nearest.
        scheme: type, bits, group size and symmetry.
        damping: share of the Hessian's mean diagonal that is added to its diagonal.
        block_size: features whose errors are passed on together.
        act_order: visit features by decreasing diagonal of the Hessian, with scales from the original weights; else in
            order, each group's scale from its weights as they are when it begins.
        scale_search: choose scales by their error; else they cover the range.
        name: the layer, for errors.

    Returns:
        Stored weights `[out, in]`, scales `[out, groups]` float32, and zero points `[out, groups]` int8 or None, as
        `round_weight` gives.

    Raises:
        OptkitError: a weight is not finite, or the Hessian is not positive definite with a hundred times the damping.
    """
    import torch

    groups = grouped(weight, scheme, name=name)
    size = groups.shape[-1]
    features = len(hessian)
    order = torch.arange(features, device=hessian.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    shares = _shares(hessian[order][:, order], damping, name)
    # The part of the error in a feature that the features after it cannot make good.
    lasting = shares.diagonal().square().reciprocal()

    def fit(groups: Tensor, lasting: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points `[out, groups]` of groups `[out, groups, group size]`."""
        return _search(groups, lasting, scheme) if scale_search else ranges(groups.amin(-1), groups.amax(-1), scheme)

    scales: list[Tensor] = []
    zeros: list[Tensor | None] = []

    def keep(scale: Tensor, zero_point: Tensor | None) -> None:
        scales.extend(scale.T.contiguous())
        zeros.extend([None] * scale.shape[1] if zero_point is None else zero_point.T.contiguous())

    if act_order:
        keep(*fit(groups, lasting[torch.argsort(order)].reshape(-1, size)))
    places = (order // size).tolist()
    # A feature's weights lie together: [in, out].
    columns = groups.flatten(1).T[order].contiguous()
    stored = torch.empty_like(columns, dtype=scheme.dtype)
    start = 0
    while start < features:
        end = min(features, start - start % block_size + block_size)
        if not act_order:
            end = min(end, start - start % size + size)
            if start % size == 0:
                keep(*fit(columns[start : start + size].T.unsqueeze(1), lasting[start : start + size]))
        errors = torch.empty_like(columns[start:end])
        for feature in range(start, end):
            before = errors[: feature - start]
            column = torch.addmv(columns[feature], before.T, shares[feature, start:feature], alpha=-1)
            scale, zero_point = scales[places[feature]], zeros[places[feature]]
            stored[feature] = round_with(column.unsqueeze(-1), scale, zero_point, scheme).squeeze(-1)
            shifted = stored[feature].float() if zero_point is None else stored[feature].float() - zero_point
            torch.div(column - shifted * scale, shares[feature, feature], out=errors[feature - start])
        columns[end:].addmm_(shares[end:, start:end], errors, alpha=-1)
        start = end
    back = torch.argsort(order)
    zero_points = [zero_point for zero_point in zeros if zero_point is not None]
    return (
        stored[back].T.contiguous(),
        torch.stack(scales, 1),
        torch.stack(zero_points, 1) if zero_points else None,
    )


def _shares(hessian: Tensor, damping: float, name: str) -> Tensor:
    """How errors are passed on: that of feature `j` costs feature `k > j` as much as `C[k, j] / C[j, j]` times it.

    `C` is the lower triangular matrix with `C C^T = H^-1`, `[in, in]` float32.
    """
    import torch

    # In float64: calibration data often has far fewer directions than features.
    hessian = hessian.double()
    mean = hessian.diagonal().mean()
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    for factor in _DAMPINGS:
        damped = hessian + identity * (factor * damping * mean)
        # Cholesky's factorization from the last feature to the first, H = R R^T with R upper triangular, spares the
        # inverse of H: C is the inverse of R, transposed.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0 and torch.isfinite(lower).all():
            inverse: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return inverse.T.float().contiguous()
    raise OptkitError(
        f"the Hessian of its inputs is not positive definite with {_DAMPINGS[-1]} times the damping",
        where=name,
        found=damping,
        remedy="raise damping, give more calibration data, or add the layer to ignore",
    )


def _search(groups: Tensor, weights: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of the shrunk ranges whose squared errors, weighted by feature, are the smallest.

    Args:
        groups: `[out, groups, group size]` float32.
        weights: `[groups, group size]` float32, or `[group size]` for one group.
        scheme: of the integers.
    """
    return least_wrong(groups, _SHRINKS, scheme, lambda wrong: wrong.square_().mul_(weights).sum(-1))
