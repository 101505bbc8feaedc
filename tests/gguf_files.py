"""GGUF files as they are read back, formats that are written, and tokenizers that llama.cpp knows."""

from __future__ import annotations

import json

import gguf
import numpy as np
import transformers
from tokenizers import Regex, Tokenizer, pre_tokenizers

from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts

FORMATS = {
    "Q8_0": {"bits": 8, "granularity": "group", "group_size": 32},
    "Q8_0-channel": {"bits": 8},
    "Q4_0": {"bits": 4, "granularity": "group", "group_size": 32},
    "Q4_0-wide": {"bits": 4, "granularity": "group", "group_size": 64},
    "Q4_0-3": {"bits": 3, "granularity": "group", "group_size": 32},
    "Q4_1": {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False},
    "F32": {"bits": 8, "symmetric": False},
}


def quantized(model, bits, **options):
    return RTN(bits=bits, **options).apply(model, context(texts()))


def tensors(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def metadata(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def parts(data, kind):
    """Integers `[out, in]` as stored, scales and minima `[out, blocks]`, by the layout in `ggml-common.h`."""
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    by_block = np.asarray(data).reshape(len(data), -1, size)
    fields = by_block[..., : 4 if kind == "Q4_1" else 2].copy().view("<f2").astype(np.float64)
    codes = by_block[..., 4 if kind == "Q4_1" else 2 :]
    if kind == "Q8_0":
        integers = codes.copy().view(np.int8)
    else:
        integers = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.int8) - 8
    return integers.reshape(len(data), -1), fields[..., 0], fields[..., -1]


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def other_tokenizer(tokenizer, pre=None, normalizer=None, **options):
    """The same tokens, but another way to split text."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["model"] |= options
    backend = Tokenizer.from_str(json.dumps(whole))
    if pre is not None:
        backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


SPLITS = {
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        {},
    ),
    "llama-bpe": (split(rf"{WORDS}|\p{{N}}{{1,3}}{REST}"), {"ignore_merges": True}),
    "qwen2": (split(rf"{WORDS}|\p{{N}}{REST}"), {}),
}
