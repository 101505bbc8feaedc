"""AWQ: weights that meet large activations are scaled up before they are rounded, and the activations down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from optkit.model import Model, ModelCard
from optkit.transforms import TransformContext
from optkit_quantize.quantizer import WeightOnly, install
from optkit_quantize.rounding import grouped, least_wrong, round_weight, round_with
from optkit_quantize.structure import Feed, Layout, fold, inputs_of, layout_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.blockwise import Block
    from optkit.quantized import WeightScheme

__all__ = ["AWQ", "best_scale", "clipped_round", "product_error", "scales_to_try"]

_WINDOWS = 4
"""Of the calibration data, evenly spaced, on which the scales before an attention or MLP are compared. Whole ones: the
few tokens with huge activations, a text's first above all, decide much, and single tokens would miss or repeat them."""
_SHARES = tuple(1 - step / 40 for step in range(21))
_UNCLIPPED = ("q_proj", "k_proj")


class AWQ(WeightOnly):
    """Weight-only quantization that rounds those weights finer which meet large activations.

    Weights stay in proportion to what they meet: each channel of a tensor is divided by a power of its mean magnitude,
    and the weights that read it are multiplied, so that the model without rounding computes what it did. Then ranges
    are clipped. The reference's scales that also divide by the magnitude of the weights (duo scaling) were tried on six
    blocks of SmolLM2 in 3 and 4 bits; they were as often worse as better, for twice the time, and are left out.

    Costs 168 s for SmolLM2-135M on two cores with 8 windows of 512 tokens, and the memory of one block with its inputs.
    Scales before an attention or MLP are compared on 4 of the windows, the others and all clips on all tokens. Not at
    8 bits, where rounding to nearest is near lossless already, and not for architectures whose structure is not known:
    GPTQ needs none.

    Paper: Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, arXiv:2306.00978.
    """

    calibration: ClassVar[bool] = True

    grid: int = Field(default=20, ge=1, le=100)
    """Exponents to try for the scales of each tensor: multiples of 1 / grid below 1, of which 0 is no scaling."""
    clip: bool = True
    """Choose each scale of weights among those of ranges shrunk by up to a half, by the error of the layer's output;
    else it covers the whole range. Queries and keys are never clipped: their errors meet in a product."""

    def check(self, card: ModelCard) -> None:
        super().check(card)
        _layout(card.tags)

    def forward_passes(self) -> float:
        # Three runs of each block, and the searches: on 32 windows of 512 tokens they take as long as three more.
        return 6.0

    def apply(self, model: Model, context: TransformContext) -> Model:
        from optkit.blockwise import walk

        layout = _layout(model.tags)
        for block in walk(model.module, context, list(self.chosen(model.module))):
            self._quantize(model, block, layout, context.calibration.tokens)
        return model.tagged(*self.provides())

    def _quantize(self, model: Model, block: Block, layout: Layout, tokens: int) -> None:
        from optkit.hessians import Hessians

        module, seen = model.module, Hessians()
        # What is around the blocks, a head, is rounded without scales.
        feeds = layout.feeds(module, block.path) if block.path else ()
        sources = {name: feed.readers[0] for feed in feeds for name in feed.readers}
        inputs = inputs_of(block, {sources.get(name, name): None for name in block.names}, tokens, also=seen.see)
        hessians = {name: seen.of(sources.get(name, name)) for name in block.names}
        for feed in feeds:
            layers = {name: module.get_submodule(name) for name in feed.readers if name in block.names}
            if not layers:
                continue
            tried = scales_to_try(feed.shared(inputs[feed.readers[0]].mean).mean(-1), self.grid)
            if feed.scope in layers:
                error = product_error(layers, hessians[feed.scope])
            else:
                error = _module_error(module, block, feed.scope)
            scale = best_scale(feed, layers, tried, self.scheme, error)
            fold(module, feed, scale)
            for name in layers:
                spread = feed.spread(scale)
                hessians[name] = hessians[name] / (spread * spread.unsqueeze(1))
        # All scales before the first rounding: v and up make what o and down read.
        for name in block.names:
            layer: Any = module.get_submodule(name)
            clip = self.clip and name.rpartition(".")[2] not in _UNCLIPPED
            if clip:
                rounded = clipped_round(layer.weight, hessians[name], self.scheme, name=name)
            else:
                rounded = round_weight(layer.weight, self.scheme, name=name)
            install(model, name, self.quantized(layer, *rounded))


def _layout(tags: Iterable[str]) -> Layout:
    return layout_of(tags, what="AWQ", remedy="use quantize.gptq, which folds nothing")


def product_error(layers: Mapping[str, nn.Module], hessian: Tensor) -> Callable[[], float]:
    """How much the outputs of linear layers err, as a function of the weights that they have then.

    Args:
        layers: with their exact weights, by path.
        hessian: of the input of all, `2 X^T X / n`, `[in, in]` float32.

    Returns:
        What gives twice the mean square of the output's error, summed over the outputs.
    """
    given: dict[str, Any] = dict(layers)
    exact = {name: layer.weight.data for name, layer in given.items()}

    def error() -> float:
        wrong = {name: layer.weight.data - exact[name] for name, layer in given.items()}
        return sum(float(((part @ hessian) * part).double().sum()) for part in wrong.values())

    return error


def _module_error(module: nn.Module, block: Block, scope: str) -> Callable[[], float]:
    """The same for an attention or MLP, on a part of the calibration data."""
    import torch

    part: Any = module.get_submodule(scope)
    calls = block.calls(scope, _WINDOWS)

    def run() -> Iterator[Tensor]:
        for call in calls:
            with torch.no_grad():
                output = part(*call.args, **call.kwargs)
            yield output[0] if isinstance(output, tuple) else output

    wanted = list(run())

    def error() -> float:
        pairs = zip(run(), wanted, strict=True)
        return sum(float((ours - theirs).square().sum(dtype=torch.float64)) for ours, theirs in pairs)

    return error


def scales_to_try(magnitudes: Tensor, grid: int) -> Iterator[Tensor]:
    """Powers of the activations' magnitudes, centred around 1; first ones, which are no scaling.

    Args:
        magnitudes: mean magnitude of each channel, `[channels]` float32.
        grid: how many.

    Yields:
        `[channels]` float32, positive: `m**r / sqrt(max(m**r) * min(m**r))` for `r` = 0, 1 / grid, ... below 1; 1 for
        channels that are always 0.
    """
    import torch

    live = magnitudes > 0
    ones = torch.ones_like(magnitudes)
    for step in range(grid):
        powers = magnitudes ** (step / grid)
        if not step or not live.any():
            yield ones
        else:
            middle = (powers[live].min() * powers[live].max()).sqrt()
            yield torch.where(live, powers / middle, ones)


def best_scale(
    feed: Feed,
    layers: Mapping[str, nn.Module],
    scales: Iterable[Tensor],
    scheme: WeightScheme,
    error: Callable[[], float],
) -> Tensor:
    """The scale with which rounding the weights that read a tensor changes an output least, by squared error.

    Args:
        feed: of the tensor.
        layers: those that are going to be rounded, by path.
        scales: `[channels]` each; of equals the first is taken.
        scheme: of the rounding, to nearest.
        error: of the output with the weights as they are then.

    Raises:
        OptkitError: a weight is not finite.
    """
    from optkit.quantized import dequantize

    given: dict[str, Any] = dict(layers)
    exact = {name: layer.weight.data for name, layer in given.items()}
    errors: list[tuple[float, Tensor]] = []
    for scale in scales:
        spread = feed.spread(scale)
        for name, layer in given.items():
            # Divided here instead of in the input: the same product, without touching what makes the input.
            rounded = dequantize(*round_weight(exact[name] * spread, scheme, name=name))
            layer.weight.data = (rounded / spread).to(exact[name].dtype)
        errors.append((error(), scale))
    for name, layer in given.items():
        layer.weight.data = exact[name]
    return min(errors, key=lambda error: error[0])[1]


def clipped_round(
    weight: Tensor, hessian: Tensor, scheme: WeightScheme, *, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight matrix to nearest, with the range of each group shrunk so that the group's part of the output errs
    least.

    Args:
        weight: `[out, in]` float.
        hessian: of the input, `X^T X` times any number, `[in, in]` float32.
        scheme: bits, group size and symmetry.
        name: the layer, for errors.

    Returns:
        Stored weights, scales and zero points, as `round_weight` gives. Weights beyond the range are clipped.

    Raises:
        OptkitError: a weight is not finite.
    """
    import torch

    groups = grouped(weight, scheme, name=name)
    size = groups.shape[-1]
    # The squared error of a group's part of the output is w P w^T, with w the error of the group's weights.
    starts = range(0, len(hessian), size)
    products = torch.stack([hessian[start : start + size, start : start + size] for start in starts])
    scale, zero_point = least_wrong(
        groups,
        _SHARES,
        scheme,
        lambda wrong: ((wrong.transpose(0, 1) @ products).transpose(0, 1) * wrong).sum(-1),
    )
    return round_with(groups, scale, zero_point, scheme).flatten(1), scale, zero_point
