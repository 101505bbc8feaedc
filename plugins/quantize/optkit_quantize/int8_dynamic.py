"""Int8 weights and activations, activations by the scale of each token as it comes."""

from __future__ import annotations

from typing import Literal

from optkit.model import Model
from optkit.schemes import ActivationScheme, WeightScheme
from optkit.transforms import TransformContext
from optkit_quantize.nearest import round_to_nearest
from optkit_quantize.quantizer import Quantizer

__all__ = ["Int8Dynamic"]


class Int8Dynamic(Quantizer):
    """Int8 weights with a scale for each output channel, int8 activations with a scale for each token, without data.

    Costs as much as `quantize.rtn`: 2 s for 135 M parameters on two cores, and the memory of one layer. SmolLM2-135M's
    perplexity rises by 2.9 %, of which the weights make 0.3: a few features far above all others leave the rest of a
    token few integers, which `quantize.smoothquant` or `quantize.rotate` before it is for. Where one row is decoded at
    a time take `quantize.rtn`: the time goes into reading weights, and they alone are closer.

    Paper: Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv:2208.07339.
    Paper: Yao et al., ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers,
    arXiv:2206.01861.
    """

    bits: Literal[7, 8] = 8
    """Bits of one stored weight; it takes a byte all the same. x86 processors without VNNI add pairs of 8-bit products
    in 16 bits, which only 7 bits fit: kernels that keep to 8 bits there are slower (`onnxruntime`)."""
    symmetric: bool = True
    """Activations without a zero point. False: one for each token, which is closer, and which only the native kernels
    of the torch backend multiply as integers: after `quantize.rotate`, SmolLM2-135M's perplexity rises by 0.7 %
    instead of 1.2 (2048 tokens). Weights are symmetric always."""

    @property
    def scheme(self) -> WeightScheme:
        return WeightScheme(self.bits, None, symmetric=True)

    @property
    def activation_scheme(self) -> ActivationScheme:
        return ActivationScheme(dynamic=True, symmetric=self.symmetric)

    def apply(self, model: Model, context: TransformContext) -> Model:
        return round_to_nearest(self, model, context)
