"""A transformers decoder as the structs that the kernels take."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.quantized import QuantizedLinear
from optkit_backends.torch.native.layout import CACHES, TILE, Layer, Linear, Model, pack
from optkit_backends.torch.native.lowering import ARCHITECTURES
from optkit_backends.torch.pool import BLOCK_SIZE, LayerShape, Pool

__all__ = ["Decoder"]

_GATES = {"silu": 0, "gelu_pytorch_tanh": 1}
_GEMMAS = frozenset({"gemma", "gemma3_text"})  # norms multiply by 1 + weight, and embeddings are scaled
_LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_MOST_SUMMED = 2**15  # products of at most 255 * 255 that stay below 2^31

assert TILE == BLOCK_SIZE


class Decoder:
    """Packed weights, and what else the kernels must know.

    Args:
        module: a causal language model of transformers, of an architecture that `lowering` knows.
        windows: of each layer: how many of the last tokens it sees; None for all.
        max_length: tokens of one sequence.
        where: the model comes from, for errors.

    Attributes:
        model: what the kernels take; it points into this object, which must outlive it.
        shapes: what each layer keeps of a token.

    Raises:
        RecipeError: the model has a detail that the kernels do not.
    """

    def __init__(self, module: Any, windows: Sequence[int | None], max_length: int, where: str) -> None:
        self._where, self._keep, self._config = where, list[Tensor](), module.config
        config = module.config
        self._check_kind()
        attentions = [layer.self_attn for layer in module.model.layers]
        if len({(one.q_proj.weight.shape[0], one.k_proj.weight.shape[0], one.head_dim) for one in attentions}) > 1:
            raise self._refused("has layers of unequal numbers of heads")
        first = attentions[0]
        self._dim = first.head_dim
        self.shapes = [self._shape(attention) for attention in attentions]
        self._angles: dict[str | None, tuple[int, int]] = {}
        layers = (Layer * len(attentions))()
        for index, layer in enumerate(module.model.layers):
            self._fill(layers[index], layer, windows[index], index)
            layers[index].cosines, layers[index].sines = self._rotation(module, layer.self_attn, max_length)
        self._layers = layers
        embedding = module.model.embed_tokens
        self.model = Model(
            embedding=self._pointer(embedding.weight),
            norm=self._norm(module.model.norm),
            layers=layers,
            head=self._linear("lm_head", module.lm_head),
            layer_count=len(layers),
            hidden=config.hidden_size,
            heads=layers[0].query.out // self._dim,
            kv_heads=layers[0].key.out // self._dim,
            head_dim=self._dim,
            rotary_dim=2 * self._half,
            ffn=max(layer.gate.out for layer in layers),
            vocabulary=config.vocab_size,
            eps=config.rms_norm_eps,
            embedding_factor=config.hidden_size**0.5 if config.model_type in _GEMMAS else 1.0,
            attention_factor=first.scaling,
            logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
            gate=_GATES[self._activation()],
        )

    def use(self, pool: Pool) -> None:
        """Let the layers keep keys and values in a pool made of `shapes`, which must outlive the model."""
        self.model.blocks, self.model.cache = pool.blocks, CACHES[self.shapes[0].dtype]
        for layer, keys, values in zip(self._layers, pool.keys, pool.values, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()

    def _fill(self, to: Layer, layer: Any, window: int | None, index: int) -> None:
        attention = layer.self_attn
        to.input_norm = self._norm(layer.input_layernorm)
        if hasattr(layer, "pre_feedforward_layernorm"):
            to.attention_norm = self._norm(layer.post_attention_layernorm)
            to.ffn_norm = self._norm(layer.pre_feedforward_layernorm)
            to.output_norm = self._norm(layer.post_feedforward_layernorm)
        else:
            to.ffn_norm = self._norm(layer.post_attention_layernorm)
        if getattr(attention, "q_norm", None) is not None:
            to.query_norm, to.key_norm = self._norm(attention.q_norm), self._norm(attention.k_norm)
        for name, path in _LINEARS.items():
            setattr(to, name, self._linear(f"model.layers.{index}.{path}", layer.get_submodule(path)))
        if hasattr(attention, "k_scale"):
            heads = self.shapes[index].heads
            to.key_scale = self._pointer(attention.k_scale.flatten().expand(heads))
            to.value_scale = self._pointer(attention.v_scale.flatten().expand(heads))
        to.window = window or 0

    def _rotation(self, module: Any, attention: Any, max_length: int) -> tuple[int, int]:
        """Cosines and sines `[max_length, half]` for layers of this type, as the model has them."""
        rotary = module.model.rotary_emb
        kind = getattr(attention, "layer_type", None)
        if "layer_type" not in inspect.signature(rotary.forward).parameters:
            kind = None
        if kind not in self._angles:
            positions = torch.arange(max_length)[None]
            extra = {} if kind is None else {"layer_type": kind}
            cosines, sines = rotary(torch.zeros(1), positions, **extra)
            self._half = cosines.shape[-1] // 2
            self._angles[kind] = (
                self._pointer(cosines[0, :, : self._half]),
                self._pointer(sines[0, :, : self._half]),
            )
        return self._angles[kind]

    def _linear(self, path: str, layer: nn.Module) -> Linear:
        if not hasattr(layer, "weight") or layer.weight.ndim != 2:
            raise self._refused(f"has a layer of another kind at {path}, {type(layer).__name__}")
        if isinstance(layer, QuantizedLinear) and (layer.scheme.group_size or 2) % 2:
            raise self._refused(f"has groups of {layer.scheme.group_size} input features at {path}, an odd number")
        if isinstance(layer, QuantizedLinear) and layer.activations is not None:
            group = layer.scheme.group_size or layer.in_features
            if group > _MOST_SUMMED:
                raise self._refused(f"sums {group} products of integers at {path}, more than {_MOST_SUMMED}")
        return pack(layer, self._keep)

    def _norm(self, norm: Any) -> int:
        weight = norm.weight.detach().float()
        return self._pointer(1 + weight if self._config.model_type in _GEMMAS else weight)

    def _pointer(self, tensor: Tensor) -> int:
        self._keep.append(tensor.detach().float().contiguous())
        return self._keep[-1].data_ptr()

    def _shape(self, attention: Any) -> LayerShape:
        scheme: Any = getattr(attention, "cache_scheme", None)
        heads = attention.k_proj.weight.shape[0] // self._dim
        padded = -(-self._dim // TILE) * TILE
        dtype = torch.float32 if scheme is None else scheme.dtype
        if dtype not in CACHES:
            raise self._refused(f"keeps keys and values as {scheme.tag.removeprefix('kv:')}")
        return LayerShape(heads, self._dim, padded, dtype)

    def _check_kind(self) -> None:
        if self._config.model_type not in ARCHITECTURES:
            raise self._refused(f"is of the architecture {self._config.model_type}")
        if self._activation() not in _GATES:
            raise self._refused(f"has the activation {self._activation()}")

    def _activation(self) -> str:
        return str(getattr(self._config, "hidden_activation", None) or self._config.hidden_act)

    def _refused(self, reason: str) -> RecipeError:
        return RecipeError(
            f"the native kernels run decoders of the Llama type, and this model {reason}",
            where=self._where,
            remedy="take kernels: eager, or another backend",
        )
