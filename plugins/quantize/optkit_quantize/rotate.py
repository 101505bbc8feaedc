"""Hadamard rotations folded into the weights, so that no channel has outliers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit.errors import OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.transforms import Transform, TransformContext
from optkit_quantize.hadamard import Rotation
from optkit_quantize.quantizer import QUANTIZED

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Rotate"]

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


class Rotate(Transform):
    """Rotates what flows between the layers by a randomised Hadamard matrix that is folded into the weights. The model
    computes what it did, but for rounding in float32, and no channel of what enters attention and MLP has outliers.

    The gains of the norms go into the linear layers after them (the gains become 1); every matrix that reads from the
    residual stream or adds to it is rotated, and with `heads` so are each head's values, between v and o: R1 and R2 of
    SpinQuant, with Hadamard matrices as QuaRot has them. Rotations that need work at run time (before down, and of
    queries and keys for a quantized KV cache) are left out: every runtime would have to know them. The result is an
    ordinary model that transformers loads.

    Costs no data, 8 s of one core for 135 M parameters, and the memory of a block's matrix in float64. A head tied to
    the embedding must be untied unless the last norm's gains are all equal, since they go into the head alone: a
    further matrix of vocabulary x hidden size, 113 MB for SmolLM2-135M in float32.

    For activations in 8 bits: with `int8_dynamic` SmolLM2-135M's KL divergence falls from 0.031 to 0.011. Not before
    weights alone are rounded to few bits, until a measurement of your own model says so: SmolLM2's divergence, rounded
    to nearest in 4 bits, rises from 0.76 to 1.60 with a scale for each channel and from 0.43 to 0.77 in groups of 64.
    The gains before its MLPs hold down the few channels with huge activations, which a rotation brings back in full;
    `gptq`, which knows the activations, loses nothing by it and gains little (0.059 to 0.051 for the first 8 blocks).

    Paper: Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs, arXiv:2404.00456; Liu et al.,
    SpinQuant: LLM Quantization with Learned Rotations, arXiv:2405.16406.
    """

    requires = frozenset({"weights:float", "task:causal-lm"})
    conflicts = QUANTIZED | {"rotated", "sparsity:*"}

    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of the random signs; each seed gives another rotation, equally exact."""
    heads: bool = True
    """Whether the values of each attention head are rotated too."""

    def provides(self) -> frozenset[str]:
        return frozenset({"rotated"})

    def check(self, card: ModelCard) -> None:
        found = next((tag.removeprefix("arch:") for tag in sorted(card.tags) if tag.startswith("arch:")), "unknown")
        if found not in _ARCHITECTURES:
            raise RecipeError(
                f"rotation is folded into models of {', '.join(_ARCHITECTURES)}",
                found=found,
                remedy="leave it out: others subtract a mean or normalize elsewhere, which a rotation would change",
            )

    def after(self, card: ModelCard) -> ModelCard:
        head = card.vocab_size * card.hidden_size if card.tied_head else 0
        return replace(card, parameters=card.parameters + head, tied_head=False)

    def apply(self, model: Model, context: TransformContext) -> Model:
        module: Any = model.module
        blocks = module.model.layers
        for name, parameter in module.named_parameters():
            # One NaN would spread over its whole row, or column.
            if not parameter.isfinite().all():
                raise OptkitError("is not finite, so it cannot be rotated", where=name)
        stream = Rotation(module.model.embed_tokens.embedding_dim, self.seed)
        context.progress(0, len(blocks) + 1, "embedding and head")
        _rotate_ends(module, stream)
        for index, block in enumerate(blocks):
            context.progress(index + 1, len(blocks) + 1, f"model.layers.{index}")
            # Another seed: a head and the stream may be of one size.
            heads = Rotation(block.self_attn.head_dim, self.seed + 1) if self.heads else None
            _rotate_block(block, stream, heads)
        context.progress(len(blocks) + 1, len(blocks) + 1, "done")
        return model.tagged(*self.provides())


def _rotate_ends(module: Any, stream: Rotation) -> None:
    """The embedding, the last norm and the head."""
    import torch

    table, norm, head = module.model.embed_tokens, module.model.norm, module.lm_head
    tied = head.weight is table.weight
    if not tied or not bool((norm.weight == norm.weight[0]).all()):
        head.weight = torch.nn.Parameter(stream.rotate(head.weight, norm.weight), requires_grad=False)
        norm.weight.data.fill_(1)
        module.config.tie_word_embeddings = False
    table.weight.data = stream.rotate(table.weight)


def _rotate_block(block: Any, stream: Rotation, heads: Rotation | None) -> None:
    attention, mlp = block.self_attn, block.mlp
    for norm, layers in (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        for layer in layers:
            values = heads if layer is attention.v_proj else None
            weight, bias = stream.rotate(layer.weight.double(), norm.weight), layer.bias
            if values is not None:
                weight = _by_head(weight.T, values).T
                bias = None if bias is None else _by_head(bias, values)
            _set(layer, weight, bias)
        norm.weight.data.fill_(1)
    for layer in (attention.o_proj, mlp.down_proj):
        weight = layer.weight.double()
        if heads is not None and layer is attention.o_proj:
            weight = _by_head(weight, heads)
        _set(layer, stream.rotate(weight.T).T, None if layer.bias is None else stream.rotate(layer.bias))


def _by_head(features: Tensor, heads: Rotation) -> Tensor:
    """Rotate each head's features, the last axis, by themselves."""
    return heads.rotate(features.reshape(*features.shape[:-1], -1, heads.size)).flatten(-2)


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    layer.weight.data = weight.to(layer.weight.dtype).contiguous()
    if bias is not None:
        layer.bias.data = bias
