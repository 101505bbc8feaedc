"""Int8 weights and activations, activations by one scale a layer that calibration finds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from optkit.errors import OptkitError
from optkit.model import Model, ModelCard
from optkit.schemes import ActivationScheme, WeightScheme
from optkit.targets import select
from optkit.transforms import TransformContext
from optkit_quantize.nearest import round_calibrated
from optkit_quantize.quantizer import Quantizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from optkit_quantize.observers import Observer

__all__ = ["Int8Static"]

_CONVOLUTIONS = "Conv2d"


class Int8Static(Quantizer):
    """Int8 weights with a scale for each output channel, and int8 activations with one scale for all inputs of a layer,
    which calibration finds. For linear layers and convolutions.

    Costs two runs of the model on the calibration data, half as long again where an observer counts (all but minmax),
    and the memory of one block with its inputs. No scale has to be found when the model runs, so this is what integer
    kernels of convolutional networks and encoders read. Not for decoders, a few of whose activations are huge: one
    scale for all of them multiplies SmolLM2-135M's perplexity by 1.40 with `mse` and 1.76 with `minmax`, and by 11 with
    `histogram` and 22 with `percentile: 99.99`, which cut those off (2048 tokens). There take `quantize.int8_dynamic`.

    Paper: Nagel et al., A White Paper on Neural Network Quantization, arXiv:2106.08295.
    """

    calibration: ClassVar[bool] = True

    targets: tuple[str, ...] = ("Linear",)
    """Layers to quantize: `Linear` for all linear layers, `Conv2d` for all convolutions, exact module paths, or
    patterns that start with `re:`."""
    observer: Literal["minmax", "percentile", "histogram", "mse"] = "mse"
    """How the range of a layer's inputs is found, from what it got on calibration data: `minmax` covers everything,
    `percentile` leaves out a share at both ends, `histogram` loses the least information (KL divergence), `mse` has the
    least squared rounding error."""
    percentile: float | None = Field(default=None, gt=50, le=100)
    """Share of the inputs, in percent, that lie below the upper end; goes with `observer: percentile`, for example
    99.99."""
    bits: Literal[7, 8] = 8
    """Bits of one stored weight; it takes a byte all the same. x86 processors without VNNI add pairs of 8-bit products
    in 16 bits, which only 7 bits fit: kernels that keep to 8 bits there are slower (`onnxruntime`)."""
    symmetric: bool = False
    """Activations without a zero point: less arithmetic for some kernels, and half of the range is lost on inputs of
    one sign. Weights are symmetric always."""

    @model_validator(mode="after")
    def _share(self) -> Self:
        if (self.observer == "percentile") != (self.percentile is not None):
            raise ValueError("percentile goes with observer: percentile, and observer: percentile needs it")
        return self

    @property
    def scheme(self) -> WeightScheme:
        return WeightScheme(self.bits, None, symmetric=True)

    @property
    def activation_scheme(self) -> ActivationScheme:
        return ActivationScheme(dynamic=False, symmetric=self.symmetric)

    def planned(self, card: ModelCard) -> list[str]:
        """A card names no convolutions: where they are asked for, patterns are checked when the model is there."""
        if _CONVOLUTIONS not in self.targets:
            return super().planned(card)
        return list(card.linears) if "Linear" in self.targets else []

    def chosen(self, module: nn.Module) -> dict[str, Any]:
        """The linear layers and convolutions to quantize, by path, in the model's order.

        Raises:
            OptkitError: a convolution pads with something else than zeros.
        """
        import torch

        kinds = {"Linear": torch.nn.Linear, _CONVOLUTIONS: torch.nn.Conv2d}
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, tuple(kinds.values()))}
        named = {
            kind: [name for name, layer in layers.items() if isinstance(layer, of_kind)]
            for kind, of_kind in kinds.items()
        }
        selected = select(layers, _spelt_out(self.targets, named), _spelt_out(self.ignore, named))
        for name in selected:
            mode = getattr(layers[name], "padding_mode", "zeros")
            if mode != "zeros":
                what = "pads with something else than zeros, which no kernel for quantized convolutions does"
                raise OptkitError(what, where=name, found=mode, remedy="add it to ignore")
        return {name: layers[name] for name in selected}

    def quantized(
        self, layer: Any, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *input: Tensor | None
    ) -> Any:
        import torch

        from optkit.quantized import QuantizedConv2d

        if isinstance(layer, torch.nn.Linear):
            return super().quantized(layer, weight, scale, zero_point, *input)
        bias = None if layer.bias is None else layer.bias.detach()
        shaped = weight.reshape(layer.weight.shape)
        return QuantizedConv2d(layer, shaped, scale, zero_point, bias, self.scheme, self.activation_scheme, *input)

    def apply(self, model: Model, context: TransformContext) -> Model:
        return round_calibrated(self, model, context, self._observer())

    def _observer(self) -> Callable[[], Observer]:
        from optkit_quantize.observers import Divergence, LeastSquares, MinMax, Percentile

        made: dict[str, Callable[[], Observer]] = {
            "minmax": MinMax,
            "percentile": partial(Percentile, self.percentile or 100),
            "histogram": Divergence,
            "mse": partial(LeastSquares, symmetric=self.symmetric),
        }
        return made[self.observer]


def _spelt_out(patterns: Iterable[str], kinds: Mapping[str, list[str]]) -> list[str]:
    """Patterns with the paths of all layers of a kind in the place of its name."""
    return [name for pattern in patterns for name in kinds.get(pattern, [pattern])]
