"""Causal language models as GGUF files, which llama.cpp and every program over it read.

Names of tensors and keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.model import Model
from optkit.quantized import QuantizedLinear
from optkit_backends.llama_cpp.architectures import ARCHITECTURES, Architecture
from optkit_backends.llama_cpp.files import Facts
from optkit_backends.llama_cpp.formats import blocks, stored_as
from optkit_backends.llama_cpp.vocabulary import add_vocabulary

__all__ = ["export_gguf"]

# Parts of a decoder layer, as transformers and GGUF call them.
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
TURNED = ("self_attn.q_proj", "self_attn.k_proj")


def export_gguf(model: Model, file: Path) -> Facts:
    """Write a model as one GGUF file: weights, configuration, vocabulary and chat template.

    Integer weights keep their very integers where GGUF has blocks for them: symmetric ones of 4 bits or less become
    Q4_0, asymmetric ones Q4_1, and symmetric ones of 5 to 8 bits Q8_0. Only their scales are rounded, to float16.
    Everything else is float32: norms, layers in floating point, and what GGUF has no blocks for, dequantized.

    Args:
        model: a transformers causal LM of an architecture in `ARCHITECTURES`; without a tokenizer, the file has no
            vocabulary.
        file: to write, in a directory that exists.

    Returns:
        What the file holds.

    Raises:
        RecipeError: the model, its tokenizer or a layer has something that GGUF or llama.cpp cannot express.
    """
    return _Export(model).write(file)


class _Export:
    """One model on its way into a file."""

    def __init__(self, model: Model) -> None:
        module: Any = model.module
        self._module, self._config, self._tokenizer = module, module.config, model.tokenizer
        known = ", ".join(ARCHITECTURES)
        if self._config.model_type not in ARCHITECTURES:
            raise _refused("architecture", self._config.model_type, f"it knows {known}")
        if self._config.hidden_act != "silu":
            raise _refused("hidden_act", self._config.hidden_act, "it knows silu")
        self._architecture: Architecture = ARCHITECTURES[self._config.model_type]
        self._head_dim: int = module.model.layers[0].self_attn.head_dim
        self._linears: dict[str, tuple[str, int]] = {}

    def write(self, file: Path) -> Facts:
        self._writer = gguf.GGUFWriter(file, self._architecture.name)
        heads, kv_heads, width = self._shape()
        longest = min([self._config.max_position_embeddings, *self._windows()])
        self._add_configuration(heads, kv_heads, width, longest)
        self._add_rope()
        size = self._module.model.embed_tokens.num_embeddings
        add_vocabulary(self._writer, self._tokenizer, size)
        self._add_ends()
        for index, layer in enumerate(self._module.model.layers):
            self._add_layer(layer, index)
        self._writer.add_file_type(self._file_type())
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()
        kept = 2 * len(self._module.model.layers) * kv_heads * self._head_dim
        return Facts(size, kept, longest, self._linears)

    def _shape(self) -> tuple[int, int, int]:
        """Heads, heads of keys and values, and the width of the MLP, of every layer."""
        shapes = {
            tuple(layer.get_submodule(name).out_features for name in (*TURNED, "mlp.gate_proj"))
            for layer in self._module.model.layers
        }
        if len(shapes) > 1:
            raise RecipeError(
                "llama.cpp gives all layers of this architecture one shape, and here they differ",
                where=type(self._module).__name__,
                remedy="prune all layers alike, or choose another backend",
            )
        [(queries, keys, width)] = shapes
        return queries // self._head_dim, keys // self._head_dim, width

    def _windows(self) -> Iterator[int]:
        """How many tokens layers see. llama.cpp lets them see all, which is the same up to so many."""
        everywhere = self._config.sliding_window if self._config.model_type == "mistral" else None
        for layer in self._module.model.layers:
            window = getattr(layer.self_attn, "sliding_window", everywhere)
            if window is not None:
                yield int(window)

    def _add_configuration(self, heads: int, kv_heads: int, width: int, longest: int) -> None:
        writer, config = self._writer, self._config
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(Path(config._name_or_path).name or config.model_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(len(self._module.model.layers))
        writer.add_context_length(longest)
        writer.add_embedding_length(self._module.model.embed_tokens.embedding_dim)
        writer.add_feed_forward_length(width)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(self._head_dim)
        writer.add_value_length(self._head_dim)
        writer.add_rope_dimension_count(self._head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(self._module.model.embed_tokens.num_embeddings)

    def _add_rope(self) -> None:
        rope = self._config.rope_parameters
        kind = rope["rope_type"]
        self._writer.add_rope_freq_base(rope["rope_theta"])
        if kind == "linear":
            self._writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            self._writer.add_rope_scaling_factor(rope["factor"])
        elif kind == "llama3" and self._architecture.rope_factors:
            exponents = torch.arange(0, self._head_dim, 2, dtype=torch.float64) / self._head_dim
            factors = rope["rope_theta"] ** -exponents / self._module.model.rotary_emb.inv_freq.double()
            self._add_float("rope_freqs.weight", factors)
        elif kind != "default":
            known = "it knows default, linear" + (" and llama3" if self._architecture.rope_factors else "")
            raise _refused("rope_type", kind, known)

    def _add_ends(self) -> None:
        """The embedding, the last norm and the head; where the head is the embedding, it is stored once."""
        head, table = self._module.lm_head, self._module.model.embed_tokens
        tied = table.weight is head.weight
        if isinstance(head, QuantizedLinear) and torch.equal(head.dequantized(), table.weight):
            tied = True
        elif not tied:
            self._add_float("token_embd.weight", table.weight)
        self._add_linear("token_embd" if tied else "output", head, "lm_head", slice(None))
        self._add_float("output_norm.weight", self._module.model.norm.weight)

    def _add_layer(self, layer: nn.Module, index: int) -> None:
        parts: dict[str, Any] = dict(layer.named_modules())
        for name, tensor in NORMS.items():
            if name in parts:
                self._add_float(f"blk.{index}.{tensor}.weight", parts[name].weight)
        for name, tensor in LINEARS.items():
            path, part = f"model.layers.{index}.{name}", parts[name]
            turned = self._architecture.neighbours and name in TURNED
            rows = self._neighbours(part.out_features) if turned else slice(None)
            self._add_linear(f"blk.{index}.{tensor}", part, path, rows)
            if part.bias is not None:
                if name not in self._architecture.biases:
                    raise _refused("bias", path, "choose another backend")
                self._add_float(f"blk.{index}.{tensor}.bias", part.bias[rows])

    def _add_linear(self, tensor: str, layer: Any, path: str, rows: Tensor | slice) -> None:
        """A matrix `[out, in]`, its rows in the order of `rows`."""
        name = f"{tensor}.weight"
        if isinstance(layer, QuantizedLinear):
            self._linears[path] = self._add_quantized(name, layer, path, rows)
        elif isinstance(layer, nn.Linear):
            self._linears[path] = "F32", self._add_float(name, layer.weight[rows])
        else:
            raise RecipeError(
                "GGUF holds linear layers of one matrix",
                where=path,
                found=type(layer).__name__,
                remedy="choose another backend",
            )

    def _add_quantized(self, name: str, layer: QuantizedLinear, path: str, rows: Tensor | slice) -> tuple[str, int]:
        """Add its matrix, in blocks where they hold the integers as they are; the type, and the number of bytes."""
        kind = None if layer.scheme.type == "float" else stored_as(layer.scheme.bits, layer.scheme.symmetric)
        if kind is None:
            return "F32", self._add_float(name, layer.dequantized()[rows])
        zero_point = None if layer.zero_point is None else layer.zero_point[rows].numpy()
        data = blocks(kind, layer.weight[rows].numpy(), layer.scale[rows].float().numpy(), zero_point, path)
        self._writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        return kind, data.nbytes

    def _add_float(self, name: str, tensor: Tensor) -> int:
        """Add it as float32; the number of bytes."""
        array: npt.NDArray[np.float32] = np.ascontiguousarray(tensor.detach().float().numpy())
        self._writer.add_tensor(name, array)
        return array.nbytes

    def _neighbours(self, rows: int) -> Tensor:
        """The row of transformers for each row of GGUF: number `i` of a head and `i + head_dim / 2` side by side."""
        return torch.arange(rows).reshape(-1, 2, self._head_dim // 2).transpose(1, 2).flatten()

    def _file_type(self) -> int:
        """What most linear layers are; only shown by tools."""
        [(kind, _)] = Counter(kind for kind, _ in self._linears.values()).most_common(1)
        return int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])


def _refused(what: str, found: object, remedy: str) -> RecipeError:
    return RecipeError(f"the GGUF export knows no such {what}", found=found, remedy=remedy)
