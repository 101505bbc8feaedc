"""Round-to-nearest: each weight to the closest integer, without data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from optkit.errors import OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.targets import select
from optkit.transforms import Transform, TransformContext

if TYPE_CHECKING:
    from torch import Tensor

    from optkit.quantized import WeightScheme

__all__ = ["RTN", "quantize_weight"]


class RTN(Transform):
    """Weight-only quantization by rounding to nearest, with the range of each channel or group as its scale.

    Costs no data, 2 s for 135 M parameters on two cores, and the memory of one layer. Near lossless at 8 bits. At 4
    bits and below small models lose much of their quality: prefer an algorithm there that compensates the rounding
    error. A head that is tied to the embedding stays tied: both then read the same integers.

    Document: Nagel et al., A White Paper on Neural Network Quantization, arXiv:2106.08295, section 2.
    """

    requires = frozenset({"weights:float"})
    conflicts = frozenset({"weights:int*"})

    bits: Literal[2, 3, 4, 8] = 8
    """Bits of one stored weight."""
    granularity: Literal["channel", "group"] = "channel"
    """What shares a scale: an output channel, or `group_size` input features of one."""
    group_size: int | None = Field(default=None, ge=16, le=4096)
    """Input features in one group; goes with `granularity: group`, and divides every layer's input features."""
    symmetric: bool = True
    """Without a zero point. Asymmetric uses the integers better where weights are not centred, for a few more bytes."""
    targets: tuple[str, ...] = ("Linear",)
    """Layers to quantize: `Linear` for all linear layers, exact module paths, or patterns that start with `re:`."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave in floating point, spelt like `targets`."""

    @model_validator(mode="after")
    def _groups(self) -> RTN:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity: group, and granularity: group needs it")
        return self

    @property
    def scheme(self) -> WeightScheme:
        from optkit.quantized import WeightScheme

        return WeightScheme(self.bits, self.group_size, self.symmetric)

    def provides(self) -> frozenset[str]:
        return frozenset({f"weights:int{self.bits}-{self.granularity}" + ("" if self.symmetric else "-asym")})

    def check(self, card: ModelCard) -> None:
        inputs = {name: card.linears[name][1] for name in select(card.linears, self.targets, self.ignore)}
        odd = [name for name, count in inputs.items() if self.group_size is not None and count % self.group_size]
        if odd:
            fitting = [size for size in (16, 32, 64, 128, 256) if not any(count % size for count in inputs.values())]
            raise RecipeError(
                f"group_size does not divide the {inputs[odd[0]]} input features of {odd[0]}",
                found=self.group_size,
                remedy=f"choose {' or '.join(map(str, fitting))}" if fitting else "use granularity: channel",
            )

    def bits_per_weight(self, card: ModelCard) -> float:
        # A scale takes 32 bits, a zero point as many as a weight.
        extra = 32 + (0 if self.symmetric else self.bits)
        quantized = {name: card.linears[name] for name in select(card.linears, self.targets, self.ignore)}
        bits = sum(
            out * (inputs * self.bits + inputs / (self.group_size or inputs) * extra)
            for out, inputs in quantized.values()
        )
        rest = card.parameters - sum(out * inputs for out, inputs in quantized.values())
        return (bits + rest * 8 * card.bytes_per_parameter) / card.parameters

    def apply(self, model: Model, context: TransformContext) -> Model:
        import torch

        from optkit.quantized import QuantizedLinear, replace_module

        module = model.module
        linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
        chosen = select(linears, self.targets, self.ignore)
        scheme = self.scheme
        for done, name in enumerate(chosen):
            context.progress(done, len(chosen), name)
            layer = linears[name]
            weight, scale, zero_point = quantize_weight(layer.weight, scheme, name=name)
            quantized = QuantizedLinear(weight, scale, zero_point, layer.bias, scheme)
            tied = [
                table
                for table in module.modules()
                if isinstance(table, torch.nn.Embedding) and table.weight is layer.weight
            ]
            for embedding in tied:
                embedding.weight = torch.nn.Parameter(quantized.dequantized(), requires_grad=False)
                module.config.tie_word_embeddings = False  # type: ignore[union-attr]
            replace_module(module, name, quantized)
        context.progress(len(chosen), len(chosen), "done")
        return model.tagged(*self.provides())


def quantize_weight(
    weight: Tensor, scheme: WeightScheme, *, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight matrix to integers.

    Args:
        weight: `[out, in]` float; every group of `scheme` is rounded on its own.
        scheme: bits, group size and symmetry.
        name: the layer, for errors.

    Returns:
        Integers `[out, in]` int8, scales `[out, groups]` float32, and zero points `[out, groups]` int8 or None. A
        group of zeros has scale 1. Symmetric scales map the largest magnitude to half the integer range, so that the
        range is symmetric around zero but for the lowest integer, which is used only by rounding.

    Raises:
        OptkitError: a weight is not finite.
    """
    import torch

    low, high = scheme.range
    groups = weight.detach().float().reshape(weight.shape[0], -1, scheme.group_size or weight.shape[1])
    if not torch.isfinite(groups).all():
        raise OptkitError("a weight is not finite, so it cannot be quantized", where=name)
    zero_point = None
    if scheme.symmetric:
        scale = groups.abs().amax(-1) / ((high - low) / 2)
    else:
        minimum, maximum = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (maximum - minimum) / (high - low)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    shift = torch.zeros_like(scale)
    if not scheme.symmetric:
        shift = (low - minimum / scale).round().clamp(low, high)
        zero_point = shift.to(torch.int8)
    integers = (groups / scale.unsqueeze(-1) + shift.unsqueeze(-1)).round().clamp(low, high)
    return integers.flatten(1).to(torch.int8), scale, zero_point
