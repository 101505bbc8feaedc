"""SmoothQuant: what makes activations with outliers is divided by them, and the weights that read them multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from optkit.errors import OptkitError
from optkit.model import Model, ModelCard
from optkit.schemes import ActivationScheme, WeightScheme
from optkit.transforms import Transform, TransformContext
from optkit_quantize.quantizer import QUANTIZED
from optkit_quantize.rounding import round_weight
from optkit_quantize.structure import Feed, Inputs, Layout, fold, inputs_of, layout_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SmoothQuant", "rounding_error", "smoothing_scale"]

_SAMPLE = 1024
"""Tokens, from all of the calibration data, on which strengths are compared."""
_ALPHAS = tuple(step / 10 for step in range(11))
_WEIGHTS = WeightScheme(8, None, symmetric=True)
_ACTIVATIONS = ActivationScheme(dynamic=True)


class SmoothQuant(Transform):
    """Moves outliers from activations into weights, which have room for them; the model computes what it did, but for
    rounding in float32, and stays in floating point. A quantizer of weights and activations comes after it.

    Costs 4 s for each block of SmolLM2-135M (2 minutes for 30) on one core with 32 windows of 512 tokens, half as much
    again with `alpha: search`, and the memory of one block with its inputs. With weights and activations of 8 bits it
    halved the KL divergence of SmolLM2. Not before quantizers that leave activations in floating point: outliers in
    weights make them harder to round.

    Paper: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
    arXiv:2211.10438.
    """

    requires = frozenset({"weights:float"})
    conflicts = QUANTIZED | {"smoothed"}
    calibration: ClassVar[bool] = True

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 0.5
    """How much of the outliers moves: with 0.5 the largest activation and the largest weight of a channel become alike,
    with 1 all channels of the activations do. `search` takes for each tensor, of 0, 0.1, ... 1 and no smoothing, what
    errs least when the layers that read it are rounded to 8 bits: weights by output channel, activations by token."""
    inner: bool = False
    """Smooth between v and o and between up and down too, not only between norms and what reads them."""

    def provides(self) -> frozenset[str]:
        return frozenset({"smoothed"})

    def check(self, card: ModelCard) -> None:
        _layout(card.tags)

    def forward_passes(self) -> float:
        # Two runs of each block; the search takes as long as one more, on 32 windows of 512 tokens.
        return 3.0 if self.alpha == "search" else 2.0

    def apply(self, model: Model, context: TransformContext) -> Model:
        from optkit.blockwise import walk

        module, layout = model.module, _layout(model.tags)
        for block in walk(module, context, layout.linears(module)):
            feeds = [feed for feed in layout.feeds(module, block.path) if self.inner or feed.from_norm]
            inputs = inputs_of(block, [feed.readers[0] for feed in feeds], context.calibration.tokens, _SAMPLE)
            for feed in feeds:
                layers: dict[str, Any] = {name: module.get_submodule(name) for name in feed.readers}
                weights = {name: layer.weight for name, layer in layers.items()}
                for name, weight in weights.items():
                    if not weight.isfinite().all():
                        raise OptkitError("a weight is not finite, so it cannot be smoothed", where=name)
                fold(module, feed, self._scale(feed, weights, inputs[feed.readers[0]]))
        return model.tagged(*self.provides())

    def _scale(self, feed: Feed, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        import torch

        largest = torch.stack([weight.detach().abs().amax(0) for weight in weights.values()]).amax(0)
        activation, weight = feed.shared(inputs.largest).amax(-1), feed.shared(largest).amax(-1)
        if self.alpha != "search":
            return smoothing_scale(activation, weight, self.alpha)
        tried = [torch.ones_like(weight), *(smoothing_scale(activation, weight, alpha) for alpha in _ALPHAS)]
        errors = [rounding_error(inputs.sample, weights, feed.spread(scale)) for scale in tried]
        return tried[errors.index(min(errors))]


def _layout(tags: Iterable[str]) -> Layout:
    return layout_of(tags, what="SmoothQuant", remedy="leave it out")


def smoothing_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """What to divide each channel of the activations by: `activation**alpha / weight**(1 - alpha)`.

    Args:
        activation: largest magnitude of each channel, `[channels]` float32.
        weight: largest magnitude of the weights that read it, likewise.
        alpha: 0 to 1.

    Returns:
        `[channels]` float32, at least 1e-5; 1 where activations or weights are always 0.
    """
    import torch

    scale = (activation**alpha / weight ** (1 - alpha)).clamp(min=1e-5)
    return torch.where((activation > 0) & (weight > 0) & scale.isfinite(), scale, torch.ones_like(scale))


def rounding_error(sample: Tensor, weights: Mapping[str, Tensor], spread: Tensor) -> float:
    """Squared error of the outputs with 8-bit weights and activations, as a share of their squares, summed over layers.

    Args:
        sample: inputs before smoothing, `[vectors, features]` float32.
        weights: `[out, features]` float32, by layer.
        spread: scale of each feature, `[features]` float32.

    Raises:
        OptkitError: a weight is not finite.
    """
    import torch

    from optkit.quantized import dequantize, round_activations

    rounded = round_activations(sample / spread, _ACTIVATIONS)
    error = 0.0
    for name, weight in weights.items():
        wanted = sample @ weight.T
        given = rounded @ dequantize(*round_weight(weight * spread, _WEIGHTS, name=name)).T
        size = wanted.square().sum(dtype=torch.float64).item()
        error += (given - wanted).square().sum(dtype=torch.float64).item() / size if size else 0.0
    return error
