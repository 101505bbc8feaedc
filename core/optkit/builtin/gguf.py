"""Models in GGUF files, llama.cpp's format."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from optkit.builtin.files import locate, sha256
from optkit.builtin.huggingface import card_of
from optkit.errors import DamagedError, MissingError
from optkit.model import Model, ModelCard
from optkit.sources import Source

__all__ = ["GGUF", "read_header"]


class GGUF(Source):
    """A causal language model in one GGUF file, dequantized to float32 by transformers.

    The architectures are those that transformers converts (llama, qwen2, mistral and others).
    """

    file: str
    """The file: a path, or `package:NAME/inner/path` for a file that an installed Python package carries."""

    def inspect(self) -> ModelCard:
        file = self._file()
        metadata, tensors = read_header(file)
        architecture = metadata.get("general.architecture", "")
        get: Callable[..., Any] = lambda key, default=None: metadata.get(f"{architecture}.{key}", default)  # noqa: E731
        shapes = {f"{_transformers_name(base)}.weight": shape for base, shape in tensors.items()}
        config = {
            "model_type": architecture,
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": get("block_count"),
            "hidden_size": get("embedding_length"),
            "num_attention_heads": get("attention.head_count"),
            "num_key_value_heads": get("attention.head_count_kv"),
            "head_dim": get("attention.key_length"),
            "vocab_size": tensors.get("token_embd", (0,))[0],
            "max_position_embeddings": get("context_length", 2048),
        }
        return card_of(config, shapes, name=file.stem)

    def fingerprint(self) -> str:
        return sha256([self._file()])

    def load(self) -> Model:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from optkit.weights import quiet_transformers, tags_of

        quiet_transformers()
        file = self._file()
        read_header(file)
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        try:
            module: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (ValueError, KeyError, RuntimeError, OSError, TypeError, IndexError) as error:
            raise DamagedError(f"transformers cannot read it: {error}", where=self.file) from error
        _make_ordinary(module)
        _restore_pre_tokenizer(tokenizer, read_header(file)[0].get("tokenizer.ggml.pre"))
        return Model(module.eval().requires_grad_(False), tokenizer, tags_of(module.config))

    def _file(self) -> Path:
        file = locate(self.file)
        if not file.is_file():
            raise MissingError("is a folder, not a GGUF file", where=self.file, remedy="name the file in it")
        return file


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata and tensor shapes of a GGUF file, without its arrays and weights.

    The `gguf` package reads the same, but decodes every token of the vocabulary first: seconds, not milliseconds.
    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Returns:
        Scalars and strings by key, and shapes in PyTorch's order by tensor name without `.weight`.

    Raises:
        DamagedError: not a GGUF file of version 2 or 3, or truncated.
    """
    try:
        with file.open("rb") as stream:
            magic, version, tensors, entries = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"it starts with {magic!r}" if magic != b"GGUF" else f"it has version {version}")
            metadata = {}
            for _ in range(entries):
                key = _string(stream)
                value = _value(stream, _number(stream, "I"))
                if value is not None:
                    metadata[key] = value
            shapes, end = {}, 0
            for _ in range(tensors):
                name = _string(stream)
                dimensions = [_number(stream, "Q") for _ in range(_number(stream, "I"))]
                kind, offset = struct.unpack("<IQ", stream.read(12))
                end = max(end, offset + _bytes(math.prod(dimensions), kind))
                shapes[name.removesuffix(".weight")] = tuple(reversed(dimensions))
            if stream.tell() + end > file.stat().st_size:
                raise EOFError
    except (EOFError, struct.error) as error:
        raise DamagedError(
            "not a readable GGUF file (it ends too early)", where=str(file), remedy="get it again"
        ) from error
    except (OSError, ValueError, MemoryError, OverflowError) as error:
        remedy = "check the path, or get it again"
        raise DamagedError(f"not a readable GGUF file ({error})", where=str(file), remedy=remedy) from error
    return metadata, shapes


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


# Bytes of a block of values, and how many they are, for the tensor types that are most in use.
_BLOCKS = {0: (4, 1), 1: (2, 1), 2: (18, 32), 3: (20, 32), 6: (22, 32), 7: (24, 32), 8: (34, 32), 30: (2, 1)}
_BLOCKS |= {10: (84, 256), 11: (110, 256), 12: (144, 256), 13: (176, 256), 14: (210, 256)}


def _bytes(values: int, kind: int) -> int:
    """Bytes of a tensor; 0 for a rare type."""
    size, count = _BLOCKS.get(kind, (0, 1))
    return values // count * size


def _number(stream: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", stream.read(struct.calcsize(f"<{code}")))[0]


def _string(stream: BinaryIO) -> str:
    length = _number(stream, "Q")
    if length > 16 * 1024 * 1024:
        raise ValueError(f"a string of {length} bytes")
    return stream.read(length).decode("utf-8")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return _number(stream, _SCALARS[kind])
    of, count = struct.unpack("<IQ", stream.read(12))
    if of in _SCALARS:
        stream.seek(count * struct.calcsize(f"<{_SCALARS[of]}"), 1)
    else:
        for _ in range(count):
            _value(stream, of)
    return None


# llama.cpp's names of a decoder layer's parts, and transformers'.
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _transformers_name(name: str) -> str:
    block, _, rest = name.partition(".")
    if block != "blk":
        return _ENDS.get(name, name)
    layer, _, part = rest.partition(".")
    return f"model.layers.{layer}.{_PARTS.get(part, part)}"


def _make_ordinary(module: Any) -> None:
    """Undo what marks the module as GGUF, so that it saves and reloads as any float model."""
    import numpy as np

    config = module.config
    module.hf_quantizer = None
    del config.quantization_config
    config.architectures = [type(module).__name__]
    config._name_or_path = ""
    if hasattr(config, "rms_norm_eps"):
        # GGUF holds it as float32; the shortest decimal that rounds to it is what the authors wrote.
        config.rms_norm_eps = float(np.format_float_scientific(np.float32(config.rms_norm_eps)))


def _restore_pre_tokenizer(tokenizer: Any, name: str | None) -> None:
    """SmolLM splits numbers into digits before merging; transformers' conversion from GGUF leaves that out."""
    if name != "smollm":
        return
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, trim_offsets=True)]
    )
