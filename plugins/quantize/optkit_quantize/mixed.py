"""Bits for each layer by how much its rounding changes the model's predictions, within a budget."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from optkit.errors import RecipeError
from optkit.model import Model, ModelCard
from optkit.schemes import WeightScheme
from optkit.transforms import TransformContext
from optkit_quantize.budget import allocate, bytes_of
from optkit_quantize.quantizer import Quantizer, check_groups, install
from optkit_quantize.rounding import round_weight
from optkit_quantize.structure import fused_groups

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PLAN_FILE", "Mixed"]

PLAN_FILE = "quantization_plan.json"
"""Beside the weights: the bits of each group of layers, and the divergences by which they were chosen."""

# A stored layer has its shape beside it: two integers of 64 bits.
_SHAPE_BITS = 128


class Mixed(Quantizer):
    """Weight-only quantization with 2 to 8 bits for each layer: many where rounding changes the predictions most.

    The KL divergence of the unquantized model's next-token distribution is measured for each group of layers that a
    runtime may fuse (q, k and v; gate and up) in each width, rounded by `algorithm`, with all other layers exact. The
    widths are then chosen so that the sum of the divergences is least within `effective_bits` or `size`, or the size is
    least within `kl`: an exact search, for models of very many different layers to a 20,000th of the sizes' spread.
    That divergences add up is an approximation, best where they are small. The table stays beside the weights as
    `quantization_plan.json`.

    The model gets the tags of all candidates, whichever the budget chooses, so that the backend must be able to run
    each: ONNX Runtime has no kernel for 3 bits.

    Measuring costs about 10 minutes of one core for SmolLM2-135M's 120 groups in three widths, 1 GB of memory, and a
    device that holds the whole model; GPTQ's candidates take 7 minutes more, and a byte for each weight and width. At
    the size of uniform 4 bits in groups of 64 (4.5 bits with scales) little or nothing is won. Rounded to nearest its
    perplexity became 1.385 times as high instead of 1.404 (KL 0.367 instead of 0.423). By GPTQ it became 1.077 times as
    high, where uniform 4 bits gave 1.057 (0.097 and 0.087): take it for sizes that no single width has. Not where one
    width is good enough already, or the runtime is fast in one width only.

    Papers: Dong et al., HAWQ-V2, arXiv:1911.03852, for the sum over layers within a budget; Frantar et al., GPTQ,
    arXiv:2210.17323, for the rounding.
    """

    requires = frozenset({"weights:float", "task:causal-lm"})
    calibration: ClassVar[bool] = True

    effective_bits: float | None = Field(default=None, gt=0)
    """Budget: stored bits per weight, scales included, on average over the chosen layers. Give this, `size` or `kl`."""
    size: str | None = None
    """Budget: of the whole model's stored tensors, in MB, GB, MiB or GiB: `90 MB`."""
    kl: float | None = Field(default=None, gt=0)
    """Budget: the sum of the measured divergences, in nats a token; the smallest model within it is made."""
    candidates: tuple[Literal[2, 3, 4, 8], ...] = Field(default=(3, 4, 8), min_length=2)
    """Bits to choose from."""
    group_size: int | None = Field(default=64, ge=16, le=4096)
    """Input features that share a scale; divides every layer's. null: one scale for each output channel."""
    symmetric: bool = True
    """Without zero points."""
    algorithm: Literal["rtn", "gptq"] = "gptq"
    """How weights are rounded in the end: to nearest, or so that later weights make errors good."""
    sensitivity_tokens: int = Field(default=384, ge=16)
    """Tokens of the calibration data, in pieces of 128, on which divergences are measured."""

    @field_validator("size")
    @classmethod
    def _size(cls, size: str | None) -> str | None:
        if size is not None:
            bytes_of(size)
        return size

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if sum(budget is not None for budget in (self.effective_bits, self.size, self.kl)) != 1:
            raise ValueError("exactly one budget is needed; give effective_bits, size or kl")
        if len(set(self.candidates)) != len(self.candidates):
            raise ValueError("candidates repeats a number of bits; name each once")
        return self

    @property
    def schemes(self) -> tuple[WeightScheme, ...]:
        """The candidates, fewest bits first."""
        return tuple(WeightScheme(bits, self.group_size, self.symmetric) for bits in sorted(self.candidates))

    @property
    def scheme(self) -> WeightScheme:
        """The widest candidate."""
        return self.schemes[-1]

    def provides(self) -> frozenset[str]:
        return frozenset(scheme.tag for scheme in self.schemes)

    def check(self, card: ModelCard) -> None:
        stored = self._stored(card)
        check_groups({name: inputs for name, (_, inputs) in stored.shapes.items()}, self.group_size)
        self._limit(stored)

    def bits_per_weight(self, card: ModelCard) -> float:
        stored = self._stored(card)
        limit = self._limit(stored)
        # What a budget of divergences will take is not known before they are measured.
        return (stored.rest + (stored.bits(self.scheme) if limit is None else limit)) / card.parameters

    def forward_passes(self) -> float:
        # SmolLM2's 120 groups in 3 widths, half of the model each: 180 passes, on 384 of some 32,000 tokens. GPTQ comes
        # twice: for the candidates, and for those that are chosen.
        return 2.0 + super().forward_passes() * (2 if self.algorithm == "gptq" else 1)

    def apply(self, model: Model, context: TransformContext) -> Model:
        from optkit_quantize.candidates import by_gptq, to_nearest
        from optkit_quantize.sensitivity import divergences

        module = model.module
        layers = self.chosen(module)
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        stored = _Stored(shapes, _bits_around(module, layers))
        limit = self._limit(stored)
        groups = fused_groups(list(layers))
        gptq, sparse = self.algorithm == "gptq", any(tag.startswith("sparsity:") for tag in model.tags)
        rounding = (
            by_gptq(module, list(layers), self.schemes, context, keep_zeros=sparse) if gptq else to_nearest(module)
        )
        measured = divergences(module, groups, self.schemes, rounding, context, self.sensitivity_tokens)
        costs = [[stored.bits(scheme, names) for scheme in self.schemes] for names in groups]
        picked = allocate(costs, measured, cost=limit, loss=self.kl)
        if picked is None:
            raise RecipeError(
                f"kl: the candidates reach {sum(min(row) for row in measured):.3g} at best",
                found=self.kl,
                remedy="raise it, or add a candidate of more bits",
            )
        plan = _Plan(groups, self.schemes, measured, picked)
        context.progress(0, len(layers), plan.line(stored))
        if gptq:
            _round_by_gptq(model, plan.chosen, context, keep_zeros=sparse)
        else:
            _round_to_nearest(model, plan.chosen, context)
        budget = self.model_dump(include={"effective_bits", "size", "kl"}, exclude_none=True)
        files = {**model.files, PLAN_FILE: plan.text(stored, budget)}
        return replace(model, files=files).tagged(*self.provides())

    def _stored(self, card: ModelCard) -> _Stored:
        shapes = {name: card.linears[name] for name in self.planned(card)}
        rest = card.parameters - sum(out * inputs for out, inputs in shapes.values())
        if card.tied_head and "lm_head" in shapes:
            rest += card.vocab_size * card.hidden_size  # the embedding is stored beside the head's integers
        return _Stored(shapes, rest * 8 * card.bytes_per_parameter)

    def _limit(self, stored: _Stored) -> int | None:
        """Most stored bits of the chosen layers; None where the budget is one of divergences.

        Raises:
            RecipeError: the candidates cannot reach it, or not exceed it.
        """
        least, most = stored.bits(self.schemes[0]), stored.bits(self.schemes[-1])
        if self.effective_bits is not None:
            limit = self.effective_bits * stored.weights
            reach = f"effective_bits: the candidates reach {_reach(least, most, stored.weights)}"
        elif self.size is not None:
            limit = 8 * bytes_of(self.size) - stored.rest
            reach = f"size: the candidates reach {_reach(least + stored.rest, most + stored.rest, 8_000_000)} MB"
        else:
            return None
        # Half a bit: 4.5 times the weights may come out a little less.
        if not least - 0.5 <= limit <= most + 0.5:
            remedy = "choose one between, or other candidates"
            raise RecipeError(reach, found=self.effective_bits or self.size, remedy=remedy)
        return math.floor(limit + 0.5)


@dataclass(frozen=True, slots=True)
class _Stored:
    """What the model's tensors take on disk."""

    shapes: Mapping[str, tuple[int, int]]
    """`[out_features, in_features]` of the layers that are quantized."""
    floats: int
    """Bits of everything else."""

    @property
    def rest(self) -> int:
        """Bits of all but integers, scales and zero points."""
        return self.floats + _SHAPE_BITS * len(self.shapes)

    @property
    def weights(self) -> int:
        return sum(out * inputs for out, inputs in self.shapes.values())

    def bits(self, scheme: WeightScheme, names: Collection[str] | None = None) -> int:
        """Of these layers, by default all, in one scheme: integers packed into words of 32 bits, scales of 32 bits."""
        total = 0
        for name in self.shapes if names is None else names:
            out, inputs = self.shapes[name]
            scales = inputs // (scheme.group_size or inputs)
            total += out * _words(inputs * scheme.bits) + out * scales * 32
            total += 0 if scheme.symmetric else scales * _words(out * scheme.bits)
        return total


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which scheme each group gets, and why."""

    groups: Sequence[Sequence[str]]
    schemes: Sequence[WeightScheme]
    divergences: Sequence[Sequence[float]]
    picked: Sequence[int]

    @property
    def chosen(self) -> dict[str, WeightScheme]:
        """By layer."""
        pairs = zip(self.groups, self.picked, strict=True)
        return {name: self.schemes[pick] for names, pick in pairs for name in names}

    @property
    def divergence(self) -> float:
        """The sum over the groups, in nats a token."""
        return sum(row[pick] for row, pick in zip(self.divergences, self.picked, strict=True))

    def bits(self, stored: _Stored) -> int:
        """Of the layers as they are going to be stored."""
        return sum(stored.bits(scheme, [name]) for name, scheme in self.chosen.items())

    def line(self, stored: _Stored) -> str:
        """For people, such as `4.49 bits a weight, 96.3 MB, KL 0.08: 12 layers in 3 bits, 190 in 4, 8 in 8`."""
        counts = Counter(scheme.bits for scheme in self.chosen.values())
        layers = ", ".join(f"{counts[bits]} in {bits}" for bits in sorted(counts)).replace(" in", " layers in", 1)
        bits = self.bits(stored)
        size = (bits + stored.rest) / 8e6
        return f"{bits / stored.weights:.2f} bits a weight, {size:.1f} MB, KL {self.divergence:.2g}: {layers} bits"

    def text(self, stored: _Stored, budget: Mapping[str, Any]) -> str:
        """JSON, one line a group."""
        bits = self.bits(stored)
        facts = {
            "budget": budget,
            "effective_bits": bits / stored.weights,
            "bytes": (bits + stored.rest) // 8,
            "kl": self.divergence,
        }
        widths = [str(scheme.bits) for scheme in self.schemes]
        rows = [
            {"bits": self.schemes[pick].bits, "kl": dict(zip(widths, row, strict=True)), "layers": list(names)}
            for names, row, pick in zip(self.groups, self.divergences, self.picked, strict=True)
        ]
        head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in facts.items())
        return "{\n" + head + ' "groups": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]\n}\n"


def _round_to_nearest(model: Model, schemes: Mapping[str, WeightScheme], context: TransformContext) -> None:
    for done, (name, scheme) in enumerate(schemes.items()):
        context.progress(done, len(schemes), name)
        layer: Any = model.module.get_submodule(name)
        weight, scale, zero_point = round_weight(layer.weight, scheme, name=name)
        _install(model, name, scheme, weight, scale, zero_point)
    context.progress(len(schemes), len(schemes), "done")


def _round_by_gptq(
    model: Model, schemes: Mapping[str, WeightScheme], context: TransformContext, *, keep_zeros: bool
) -> None:
    from optkit.blockwise import walk
    from optkit.hessians import Hessians
    from optkit_quantize.candidates import gptq_rounded

    for block in walk(model.module, context, list(schemes)):
        hessians = Hessians()
        block.watch(block.names, hessians.see)
        for sharing in hessians.sharing(block.names):
            hessian = hessians.of(sharing[0])
            for scheme in dict.fromkeys(schemes[name] for name in sharing):
                alike = [name for name in sharing if schemes[name] == scheme]
                rounded = gptq_rounded(model.module, alike, hessian, scheme, keep_zeros=keep_zeros)
                for name, parts in rounded.items():
                    _install(model, name, scheme, parts["weight"], parts["scale"], parts.get("zero_point"))


def _install(
    model: Model, name: str, scheme: WeightScheme, weight: Tensor, scale: Tensor, zero_point: Tensor | None
) -> None:
    from optkit.quantized import QuantizedLinear

    layer: Any = model.module.get_submodule(name)
    bias = None if layer.bias is None else layer.bias.detach()
    install(model, name, QuantizedLinear(weight, scale, zero_point, bias, scheme))


def _bits_around(module: nn.Module, chosen: Collection[str]) -> int:
    """Of all tensors but the weights of the chosen layers; one that has two names is stored once."""
    kept = {name: tensor for name, tensor in module.state_dict().items() if name.removesuffix(".weight") not in chosen}
    sizes: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in kept.values()}
    return 8 * sum(sizes.values())


def _words(bits: int) -> int:
    """Bits of the 32-bit words that hold so many."""
    return -(-bits // 32) * 32


def _reach(least: float, most: float, unit: float) -> str:
    """The range, rounded inwards to two decimals."""
    return f"{math.ceil(100 * least / unit) / 100:.2f} to {math.floor(100 * most / unit) / 100:.2f}"
