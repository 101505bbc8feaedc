"""What the quantizers share: which layers, the checks before the work, and how a quantized layer takes its place."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from optkit.errors import RecipeError
from optkit.model import Model, ModelCard
from optkit.schemes import ActivationScheme, WeightScheme
from optkit.targets import select
from optkit.transforms import Transform

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.quantized import QuantizedLayer, QuantizedLinear

__all__ = ["QUANTIZED", "Quantizer", "WeightOnly", "check_groups", "install"]

QUANTIZED = frozenset({"weights:[!f]*", "weights:f[!l]*", "kv:*"})
"""Patterns of every `weights:*` tag but `weights:float`: what is quantized is not quantized again. Nor is a model with
a quantized KV cache, whose scales would be those of other keys and values."""


class Quantizer(Transform):
    """Rounds the weights of linear layers, each to a `QuantizedLinear` of one scheme."""

    requires = frozenset({"weights:float"})
    conflicts = QUANTIZED

    targets: tuple[str, ...] = ("Linear",)
    """Layers to quantize: `Linear` for all linear layers, exact module paths, or patterns that start with `re:`."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave in floating point, spelt like `targets`."""

    @property
    @abstractmethod
    def scheme(self) -> WeightScheme:
        """How weights are stored."""

    @property
    def activation_scheme(self) -> ActivationScheme | None:
        """How inputs are rounded, or None: they are not."""
        return None

    def provides(self) -> frozenset[str]:
        rounded = self.activation_scheme
        return frozenset({self.scheme.tag} if rounded is None else {self.scheme.tag, rounded.tag})

    def check(self, card: ModelCard) -> None:
        check_groups({name: card.linears[name][1] for name in self.planned(card)}, self.scheme.group_size)

    def bits_per_weight(self, card: ModelCard) -> float:
        # A scale takes 32 bits, a zero point as many as a weight.
        # Weights are packed only where activations stay float (optkit.weights.compressed).
        bits, group_size = self.scheme.bits if self.activation_scheme is None else 8, self.scheme.group_size
        extra = 32 + (0 if self.scheme.symmetric else bits)
        quantized = {name: card.linears[name] for name in self.planned(card)}
        stored = sum(
            out * (inputs * bits + inputs / (group_size or inputs) * extra) for out, inputs in quantized.values()
        )
        rest = card.parameters - sum(out * inputs for out, inputs in quantized.values())
        return (stored + rest * 8 * card.bytes_per_parameter) / card.parameters

    def planned(self, card: ModelCard) -> list[str]:
        """Paths of the linear layers to quantize, from the model's facts alone."""
        return select(card.linears, self.targets, self.ignore)

    def chosen(self, module: nn.Module) -> dict[str, nn.Linear]:
        """The layers to quantize, by path, in the model's order."""
        import torch

        linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
        return {name: linears[name] for name in select(linears, self.targets, self.ignore)}

    def quantized(
        self, layer: nn.Linear, weight: Tensor, scale: Tensor, zero_point: Tensor | None, *input: Tensor | None
    ) -> QuantizedLinear:
        """A layer of this scheme in the place of `layer`; `input` is scale and zero point of static activations."""
        from optkit.quantized import QuantizedLinear

        bias = None if layer.bias is None else layer.bias.detach()
        return QuantizedLinear(weight, scale, zero_point, bias, self.scheme, self.activation_scheme, *input)


class WeightOnly(Quantizer):
    """Rounds weights to few bits, in channels or groups."""

    bits: Literal[2, 3, 4, 8] = 8
    """Bits of one stored weight."""
    granularity: Literal["channel", "group"] = "channel"
    """What shares a scale: an output channel, or `group_size` input features of one."""
    group_size: int | None = Field(default=None, ge=16, le=4096)
    """Input features in one group; goes with `granularity: group`, and divides every layer's input features."""
    symmetric: bool = True
    """Without a zero point. Asymmetric uses the integers better where weights are not centred, for a few more bytes."""

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity: group, and granularity: group needs it")
        return self

    @property
    def scheme(self) -> WeightScheme:
        return WeightScheme(self.bits, self.group_size, self.symmetric)


def check_groups(inputs: dict[str, int], group_size: int | None) -> None:
    """Refuse a group size that does not divide the input features of every layer: the format has no shorter last group.

    Args:
        inputs: input features by layer.
        group_size: None always fits.

    Raises:
        RecipeError: it does not divide them; names a layer, and the sizes that would.
    """
    odd = [name for name, count in inputs.items() if group_size is not None and count % group_size]
    if odd:
        fitting = [size for size in (16, 32, 48, 64, 96, 128, 192, 256) if not any(n % size for n in inputs.values())]
        raise RecipeError(
            f"group_size does not divide the {inputs[odd[0]]} input features of {odd[0]}",
            found=group_size,
            remedy=f"choose {' or '.join(map(str, fitting))}" if fitting else "use granularity: channel",
        )


def install(model: Model, name: str, layer: QuantizedLayer) -> None:
    """Put a quantized layer in its place. An embedding that is tied to it stays tied: it reads the same numbers."""
    import torch

    from optkit.quantized import replace_module

    module: Any = model.module
    weight = module.get_submodule(name).weight
    for table in module.modules():
        if isinstance(table, torch.nn.Embedding) and table.weight is weight:
            table.weight = torch.nn.Parameter(layer.dequantized(), requires_grad=False)
            module.config.tie_word_embeddings = False
    replace_module(module, name, layer)
