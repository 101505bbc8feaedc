"""The formats of the library bitsandbytes: LLM.int8(), NF4 and FP4, in its own layers."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from optkit.errors import MissingError, OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.targets import select
from optkit.transforms import Transform, TransformContext
from optkit_quantize.quantizer import QUANTIZED

if TYPE_CHECKING:
    from torch import nn

__all__ = ["BitsAndBytes"]

_BLOCK = 64
_NESTED_BLOCK = 256


class BitsAndBytes(Transform):
    """Weights in the formats of bitsandbytes, run by its own layers: NF4, FP4, or LLM.int8().

    Costs no data, a few seconds for 135 M parameters on two cores, and the memory of one layer. NF4 is at about 4 bits
    what round-to-nearest cannot reach, because its 16 levels lie where normally distributed weights are. LLM.int8()
    rounds activations too, and computes features with outliers in floating point. The layers are made for GPUs: on a
    CPU they are slower than float, and only the `torch` backend and transformers run them. Take `quantize.gptq`,
    `quantize.awq` or `quantize.rtn` where another runtime, speed on a CPU or fewer than 4 bits matter.

    Papers: Dettmers et al., QLoRA, arXiv:2305.14314 (NF4, double quantization); Dettmers et al., LLM.int8(),
    arXiv:2208.07339.
    """

    requires = frozenset({"weights:float"})
    conflicts = QUANTIZED

    format: Literal["nf4", "fp4", "int8"] = "nf4"
    """`nf4` or `fp4`: 4 bits, one scale for 64 weights. `int8`: LLM.int8(), one scale for each output channel."""
    double_quantization: bool | None = None
    """Of `nf4` and `fp4`: round the scales to 8 bits too, which saves 0.37 bits per weight. On by default."""
    threshold: float | None = None
    """Of `int8`: a feature with a magnitude above this is computed in floating point; 0 switches that off. 6.0 by
    default, as in the paper."""
    targets: tuple[str, ...] = ("Linear",)
    """Layers to quantize: `Linear` for all linear layers, exact module paths, or patterns that start with `re:`."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave in floating point, spelt like `targets`."""

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        if self.format == "int8" and self.double_quantization is not None:
            raise ValueError("double_quantization goes with format nf4 or fp4")
        if self.format != "int8" and self.threshold is not None:
            raise ValueError("threshold goes with format int8")
        if self.threshold is not None and self.threshold < 0:
            raise ValueError("threshold must be 0 or more")
        return self

    @property
    def _double(self) -> bool:
        return self.double_quantization is not False

    @property
    def _threshold(self) -> float:
        return 6.0 if self.threshold is None else self.threshold

    def provides(self) -> frozenset[str]:
        return frozenset({f"weights:bnb-{self.format}"})

    def check(self, card: ModelCard) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingError("quantize.bitsandbytes needs bitsandbytes", remedy="pip install 'optkit[bitsandbytes]'")
        if card.tied_head and "lm_head" in select(card.linears, self.targets, self.ignore):
            raise RecipeError(
                "lm_head is tied to the embedding, which bitsandbytes has no layer for", remedy="add lm_head to ignore"
            )

    def bits_per_weight(self, card: ModelCard) -> float:
        chosen = [card.linears[name] for name in select(card.linears, self.targets, self.ignore)]
        quantized = sum(out * inputs for out, inputs in chosen)
        if self.format == "int8":
            bits = sum(out * (inputs * 8.0 + 32) for out, inputs in chosen)
        else:
            scale = 8 + 32 / _NESTED_BLOCK if self._double else 32
            bits = quantized * (4 + scale / _BLOCK)
        return (bits + (card.parameters - quantized) * 8 * card.bytes_per_parameter) / card.parameters

    def apply(self, model: Model, context: TransformContext) -> Model:
        import torch
        from transformers import BitsAndBytesConfig

        from optkit.quantized import replace_module

        # It says on every product that inputs are cast, which is what the format is.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        module: Any = model.module
        linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
        chosen = select(linears, self.targets, self.ignore)
        for done, name in enumerate(chosen):
            context.progress(done, len(chosen), name)
            if not torch.isfinite(linears[name].weight).all():
                raise OptkitError("a weight is not finite, so it cannot be quantized", where=name)
            replace_module(module, name, self._layer(linears[name]))
        settings: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": self._threshold}
        if self.format != "int8":
            settings = {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.format,
                "bnb_4bit_use_double_quant": self._double,
                "bnb_4bit_compute_dtype": torch.float32,
            }
        left = [name for name in linears if name not in set(chosen)]
        module.config.quantization_config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=left).to_dict()
        context.progress(len(chosen), len(chosen), "done")
        return model.tagged(*self.provides())

    def _layer(self, linear: nn.Linear) -> nn.Module:
        import torch
        from bitsandbytes import nn as library

        made: Any
        shape = (linear.in_features, linear.out_features)
        if self.format == "int8":
            made = library.Linear8bitLt(
                *shape, bias=linear.bias is not None, has_fp16_weights=False, threshold=self._threshold, device="meta"
            )
            made.weight = library.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
        else:
            made = library.Linear4bit(
                *shape,
                bias=linear.bias is not None,
                compute_dtype=torch.float32,
                compress_statistics=self._double,
                quant_type=self.format,
                device="meta",
            )
            made.weight = library.Params4bit(
                linear.weight.detach(),
                requires_grad=False,
                compress_statistics=self._double,
                quant_type=self.format,
                module=made,
            )
        if linear.bias is not None:
            made.bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
        # Arriving on a device is when the library quantizes.
        made.to("cpu")
        made.eval().requires_grad_(False)
        layer: nn.Module = made
        return layer
