"""Decoders as ONNX graphs of ONNX Runtime's fused operators, straight from their transformers modules.

The new tokens of all rows lie packed on one `[tokens]` axis, so that linear layers never see padding; only attention
works on `[rows, width]`. Operators: `docs/ContribOperators.md` of ONNX Runtime 1.32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from optkit.errors import RecipeError
from optkit.kv import cache_scheme
from optkit.quantized import QuantizedLinear
from optkit.shapes import LowRankLinear
from optkit_backends.onnxruntime.builder import MICROSOFT, GraphBuilder
from optkit_backends.onnxruntime.files import Facts

__all__ = ["compile_module"]

FLOAT, INT8, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64
# The other kinds depend on the length of the sequence, so their angles have no table.
TABLED_ROPE = ("default", "linear", "llama3", "yarn")


def compile_module(module: nn.Module, directory: Path, *, accuracy_level: int, block_size: int) -> None:
    """Write graph, weights and facts.

    Args:
        module: a transformers causal LM, of an architecture that `OnnxRuntime.lowering` allows.
        directory: exists and is empty.
        accuracy_level: of MatMulNBits.
        block_size: of MatMulNBits, where the weights allow it.

    Raises:
        RecipeError: the model has something that the graph cannot express.
    """
    model: Any = module
    config = model.config
    rope = config.rope_parameters["rope_type"]
    if rope not in TABLED_ROPE:
        raise RecipeError(
            "the onnxruntime backend knows no such rope_type", found=rope, remedy=f"it knows {', '.join(TABLED_ROPE)}"
        )
    if config.hidden_act != "silu":
        raise RecipeError("the onnxruntime backend knows silu only as hidden_act", found=config.hidden_act)
    builder = GraphBuilder(directory, accuracy_level, block_size)
    decoder = _Decoder(builder, model)
    decoder.build()
    builder.save(config.model_type)
    Facts(
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        vocab_size=model.lm_head.out_features,
        max_length=config.max_position_embeddings,
        cache_dtype="float32" if decoder.cache is None else "int8",
    ).write(directory)


class _Decoder:
    """One model on its way into a graph."""

    def __init__(self, builder: GraphBuilder, model: Any) -> None:
        self.builder, self.model, self.config = builder, model, model.config
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self.kv_heads = [layer.self_attn.k_proj.out_features // self.head_dim for layer in model.model.layers]
        self.cache = cache_scheme(model)
        self.tokens = builder.input("tokens", INT64, ["tokens"])
        # From packed tokens to [rows, width] and back: the token of each place, and the place of each token.
        self.spread = builder.input("spread", INT64, ["rows", "width"])
        self.places = builder.input("places", INT64, ["tokens", 2])
        self.lengths = [
            builder.input("seqlens_k", INT32, ["rows"]),
            builder.input("total_sequence_length", INT32, []),
        ]
        self.query_seqlens = builder.input("query_seqlens", INT32, ["rows"])
        self.logit_rows = builder.input("logit_rows", INT64, ["logits"])

    def build(self) -> None:
        body = self.model.model
        self.angles = self._angles()
        # Each norm also adds up the residual stream: `hidden` is the stream, `update` what was not added yet.
        hidden, update = self._embedding(), None
        places = self.places
        for index, layer in enumerate(body.layers):
            path = f"model.layers.{index}"
            normed, hidden = self._norm(hidden, update, layer.input_layernorm, f"{path}.input_layernorm")
            if index == len(body.layers) - 1:
                # Behind its keys and values, the last layer is for those tokens alone whose logits are wanted.
                hidden = self.builder.node("Gather", [hidden, self.logit_rows], "logit_rows.hidden", axis=0)
                places = self.builder.node("Gather", [places, self.logit_rows], "logit_rows.places", axis=0)
            update = self._attention(normed, layer.self_attn, index, places, f"{path}.self_attn")
            name = f"{path}.post_attention_layernorm"
            normed, hidden = self._norm(hidden, update, layer.post_attention_layernorm, name)
            update = self._mlp(normed, layer.mlp, f"{path}.mlp")
        normed, _ = self._norm(hidden, update, body.norm, "model.norm")
        logits = self.builder.linear(normed, self.model.lm_head, "lm_head")
        self.builder.output(logits, "logits", FLOAT, ["logits", self.model.lm_head.out_features])

    def _angles(self) -> list[ir.Value]:
        # One position more than the model has: padding may stand there, and its angles are looked up too.
        positions = torch.arange(self.config.max_position_embeddings + 1)[None]
        cos, sin = self.model.model.rotary_emb(torch.zeros(1), positions)
        half = self.head_dim // 2
        return [
            self.builder.constant(f"model.rotary_emb.{name}", table[0, :, :half])
            for name, table in (("cos", cos), ("sin", sin))
        ]

    def _embedding(self) -> ir.Value:
        head, table, name = self.model.lm_head, self.model.model.embed_tokens, "model.embed_tokens"
        if isinstance(head, QuantizedLinear) and torch.equal(head.dequantized(), table.weight):
            blocks, (data, scales, zero_points) = self.builder.integers([head], "lm_head")
            assert data is not None
            # A matrix here and blobs in MatMulNBits: two shapes for the same bytes.
            matrix = self.builder.reshaped(f"{name}.weight", data, blocks.data.shape)
            operands = [matrix, self.tokens, scales, *([] if zero_points is None else [zero_points])]
            sizes = {"bits": blocks.bits, "block_size": blocks.block_size}
            return self.builder.node(
                "GatherBlockQuantized", operands, name, MICROSOFT, gather_axis=0, quantize_axis=1, **sizes
            )
        owner = "lm_head" if table.weight is head.weight else name
        return self.builder.node("Gather", [self.builder.constant(f"{owner}.weight", table.weight), self.tokens], name)

    def _norm(self, hidden: ir.Value, update: ir.Value | None, norm: Any, name: str) -> tuple[ir.Value, ir.Value]:
        """RMS norm of `hidden + update`, and that sum."""
        gamma = self.builder.constant(f"{name}.weight", norm.weight)
        epsilon = float(norm.variance_epsilon)
        if update is None:
            operator = "SimplifiedLayerNormalization"
            return self.builder.node(operator, [hidden, gamma], name, axis=-1, epsilon=epsilon), hidden
        operator = "SkipSimplifiedLayerNormalization"
        operands = [hidden, update, gamma]
        normed, _, _, total = self.builder.nodes(operator, operands, name, MICROSOFT, 4, epsilon=epsilon)
        return normed, total

    def _attention(self, hidden: ir.Value, layer: Any, index: int, places: ir.Value, path: str) -> ir.Value:
        """What attention gives to the tokens at `places` `[tokens, 2]`; all of them see, and are seen."""
        builder = self.builder
        spread = [
            builder.node("Gather", [part, self.spread], f"{path}.spread.{place}", axis=0)
            for place, part in enumerate(self._queries(hidden, layer, path))
        ]
        shape = ["rows", self.kv_heads[index], "capacity", self.head_dim]
        kept = FLOAT if self.cache is None else INT8
        past = [builder.input(f"past.{index}.{kind}", kept, shape) for kind in ("key", "value")]
        scales, rounding = self._cache_scales(layer, self.kv_heads[index], path)
        absent: list[ir.Value | None] = [None]
        output, *present = builder.nodes(
            "GroupQueryAttention",
            # Absent: position_ids to head_sink, and the norms' weights. Key and value are absent too where one product
            # makes all three.
            [
                *spread,
                *absent * (3 - len(spread)),
                *past,
                *self.lengths,
                *self.angles,
                *absent * 3,
                *scales,
                *absent * 2,
                self.query_seqlens,
            ],
            path,
            MICROSOFT,
            3,
            num_heads=layer.q_proj.out_features // self.head_dim,
            kv_num_heads=self.kv_heads[index],
            do_rotary=1,
            scale=float(layer.scaling),
            local_window_size=self._window(layer),
            **rounding,
        )
        for value, kind in zip(present, ("key", "value"), strict=True):
            builder.output(value, f"present.{index}.{kind}", kept, shape)
        packed = builder.node("GatherND", [output, places], f"{path}.pack")
        return builder.linear(packed, layer.o_proj, f"{path}.o_proj")

    def _cache_scales(self, layer: Any, heads: int, path: str) -> tuple[list[ir.Value | None], dict[str, Any]]:
        """What GroupQueryAttention must know of its cache: scales of keys and values, and attributes."""
        if self.cache is None:
            return [None, None], {}
        by_head = self.cache.granularity == "head"
        # The kernel knows a scale for each channel, not for each head.
        shape = (1, heads, 1, self.head_dim)
        scales: list[ir.Value | None] = [
            self.builder.constant(f"{path}.{name}", scale.expand(shape) if by_head else scale)
            for name, scale in (("k_scale", layer.k_scale), ("v_scale", layer.v_scale))
        ]
        kind = "PER_CHANNEL" if by_head else "PER_TENSOR"
        return scales, {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}

    def _queries(self, hidden: ir.Value, layer: Any, path: str) -> list[ir.Value]:
        """Queries, keys and values: side by side in one value where a single product can make them, else in three."""
        layers = [layer.q_proj, layer.k_proj, layer.v_proj]
        formats = {one.scheme if isinstance(one, QuantizedLinear) else type(one) for one in layers}
        if len(formats) == 1 and LowRankLinear not in formats and not hasattr(layer, "q_norm"):
            return [self.builder.stacked(hidden, layers, f"{path}.qkv_proj")]
        query, key, value = (
            self.builder.linear(hidden, one, f"{path}.{name}_proj") for one, name in zip(layers, "qkv", strict=True)
        )
        if hasattr(layer, "q_norm"):
            query = self._head_norm(query, layer.q_norm, layer.q_proj.out_features, f"{path}.q_norm")
            key = self._head_norm(key, layer.k_norm, layer.k_proj.out_features, f"{path}.k_norm")
        return [query, key, value]

    def _window(self, layer: Any) -> int:
        """Tokens that a query sees, itself included, or -1 for all."""
        everywhere = self.config.sliding_window if self.config.model_type == "mistral" else None
        window = getattr(layer, "sliding_window", everywhere)
        return -1 if window is None else int(window)

    def _head_norm(self, hidden: ir.Value, norm: Any, width: int, name: str) -> ir.Value:
        """RMS norm of every head of `[tokens, width]` by itself."""
        by_head = self.builder.constant("shape.by_head", torch.tensor([-1, self.head_dim]))
        heads = self.builder.node("Reshape", [hidden, by_head], f"{name}.by_head")
        normed, _ = self._norm(heads, None, norm, name)
        by_token = self.builder.constant(f"shape.{width}", torch.tensor([-1, width]))
        return self.builder.node("Reshape", [normed, by_token], f"{name}.by_token")

    def _mlp(self, hidden: ir.Value, layer: Any, path: str) -> ir.Value:
        # Two products and not one: splitting a stacked output would cost more than it saves.
        gate = self.builder.linear(hidden, layer.gate_proj, f"{path}.gate_proj")
        up = self.builder.linear(hidden, layer.up_proj, f"{path}.up_proj")
        # QuickGelu is x * sigmoid(alpha * x), so with alpha 1 it is silu in one pass.
        activated = self.builder.node("QuickGelu", [gate], f"{path}.act_fn", MICROSOFT, alpha=1.0)
        product = self.builder.node("Mul", [activated, up], f"{path}.mul")
        return self.builder.linear(product, layer.down_proj, f"{path}.down_proj")
