"""HQQ: scales and zero points that fit most weights of a group closely and let outliers go. No data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from optkit.model import Model
from optkit.transforms import TransformContext
from optkit_quantize.quantizer import WeightOnly, install
from optkit_quantize.rounding import grouped, ranges, round_with

if TYPE_CHECKING:
    from torch import Tensor

    from optkit.quantized import WeightScheme

__all__ = ["HQQ", "hqq_round"]

# Of beta in an iteration: the kappa of the paper.
_GROWTH = 1.01


class HQQ(WeightOnly):
    """Weight-only quantization with scales and zero points optimised for the weights alone.

    Costs no data, 19 s of one core for 135 M parameters, and the memory of a few copies of one layer. It gains little
    over rounding to nearest: with symmetric groups of 64, SmolLM2-135M's perplexity is 1.42 times as high afterwards at
    4 bits (rounded to nearest: 1.46) and 6.2 times at 3 bits (6.9), which makes a model useless. With wide groups it
    loses: 2.17 against 1.84 at 4 bits in groups of 192. Do not use it where there is calibration data: `quantize.gptq`
    then does far better.

    The paper keeps the scale and optimises a float zero point. Ours is stored as an integer, so it is rounded in every
    iteration, and the scale is optimised too; symmetric weights have only that. The paper's `beta` is for errors in the
    unit of the weights, where its 10 sets hardly anything aside; ours is for errors in steps, so that it means the same
    in every layer.

    Document: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023,
    https://mobiusml.github.io/hqq_blog/.
    """

    lp_norm: float = Field(default=0.7, gt=0, le=1)
    """`p`: the sum of `|error|^p` is minimised. The less it is, the more outliers may err for the others' sake."""
    beta: float = Field(default=1.0, gt=0)
    """Weight of the quadratic term at first. Errors of more than `beta ** (1 / (p - 2))` steps of the range's scale are
    set aside as outliers': 1 step at 1, a sixth of a step at 10. From about 1000 on all are, and nothing changes."""
    iterations: int = Field(default=20, ge=1, le=1000)
    """The most iterations. A group that gets no better ends earlier."""

    def apply(self, model: Model, context: TransformContext) -> Model:
        chosen = self.chosen(model.module)
        for done, (name, layer) in enumerate(chosen.items()):
            context.progress(done, len(chosen), name)
            rounded = hqq_round(
                layer.weight.to(context.device),
                self.scheme,
                lp_norm=self.lp_norm,
                beta=self.beta,
                iterations=self.iterations,
                name=name,
            )
            install(model, name, self.quantized(layer, *rounded).cpu())
        context.progress(len(chosen), len(chosen), "done")
        return model.tagged(*self.provides())


def hqq_round(
    weight: Tensor,
    scheme: WeightScheme,
    *,
    lp_norm: float = 0.7,
    beta: float = 1.0,
    iterations: int = 20,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight matrix with the scales and zero points that make the sum of `|error|^p` of each group small.

    Starts from those that cover the range. In turn: errors large enough to be outliers' are set aside by the shrinkage
    operator of the lp norm, and zero point and scale are fitted to the rest by least squares. The best of all is kept,
    so no group is worse than rounded to nearest.

    Args:
        weight: `[out, in]` float.
        scheme: type, bits, group size and symmetry.
        lp_norm: `p`, above 0.
        beta: weight of the quadratic term at first, for errors in steps of the first scale; more sets aside more.
        iterations: the most.
        name: the layer, for errors.

    Returns:
        Stored weights `[out, in]`, scales `[out, groups]` float32, and zero points `[out, groups]` int8 or None, as
        `round_weight` gives.

    Raises:
        OptkitError: a weight is not finite.
    """
    import torch

    groups = grouped(weight, scheme, name=name)
    first, zero_point = ranges(groups.amin(-1), groups.amax(-1), scheme)
    # In steps of the first scale, so that beta means the same in every group.
    steps = (groups / first.unsqueeze(-1)).flatten(0, 1)
    scale = torch.ones_like(steps[:, 0])
    zero = None if zero_point is None else zero_point.flatten()
    best_scale, best_zero = scale.clone(), None if zero is None else zero.clone()
    least = torch.full_like(scale, torch.inf)
    active = torch.arange(len(steps), device=steps.device)
    for iteration in range(iterations + 1):
        stored = round_with(steps, scale, zero, scheme).float()
        error = steps - _shifted(stored, zero) * scale.unsqueeze(-1)
        loss = error.abs().pow(lp_norm).sum(-1)
        better = loss < least[active]
        active, steps, error, stored, scale = (t[better] for t in (active, steps, error, stored, scale))
        least[active], best_scale[active] = loss[better], scale
        if zero is not None and best_zero is not None:
            zero = zero[better]
            best_zero[active] = zero
        if iteration == iterations or not len(active):
            break
        kept = steps - _shrink(error, lp_norm, beta * _GROWTH**iteration)
        if zero is not None:
            zero = (stored - kept / scale.unsqueeze(-1)).mean(-1).round().clamp(*scheme.range).to(torch.int8)
        shifted = _shifted(stored, zero)
        power, product = shifted.square().sum(-1), (shifted * kept).sum(-1)
        scale = torch.where((power > 0) & (product > 0), product / power, scale)
    scale = best_scale.reshape(first.shape) * first
    zero_point = None if best_zero is None else best_zero.reshape(first.shape)
    return round_with(groups, scale, zero_point, scheme).flatten(1), scale, zero_point


def _shifted(stored: Tensor, zero_point: Tensor | None) -> Tensor:
    return stored if zero_point is None else stored - zero_point.unsqueeze(-1)


def _shrink(error: Tensor, p: float, beta: float) -> Tensor:
    """The proximal operator of `|x|^p / beta`, as the paper approximates it: zero for what is no outlier."""
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1) / beta).clamp(min=0)
