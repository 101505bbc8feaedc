"""Tokenizers of transformers as the metadata of GGUF, from which llama.cpp builds its own.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

import json
from typing import Any

import gguf

from optkit.errors import RecipeError

__all__ = ["add_vocabulary"]

Steps = tuple[tuple[str, Any], ...]

# llama.cpp splits text by regular expressions of its own, one for each name: `llama-vocab.cpp`.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE: dict[tuple[Steps, bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}"), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", rf"{_WORDS}|\p{{N}}{_REST}"), ("ByteLevel", False)), False): "qwen2",
}
"""By the steps of a pre-tokenizer, and whether words that are tokens stay whole."""


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Add tokens, merges, special tokens and chat template.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: of transformers, with a byte-level BPE as GPT-2, Llama 3, Qwen and SmolLM have it; or None, for a
            file without a vocabulary, which takes token ids only.
        size: rows of the embedding; ids that are no token get a name that no text has.

    Raises:
        RecipeError: llama.cpp would split text in another way.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise _refused(f"{type(tokenizer).__name__}, which is not of the tokenizers library")
    if len(tokenizer) > size:
        raise RecipeError(
            f"it has more tokens than the embedding has rows, {size}", where="tokenizer", found=len(tokenizer)
        )
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(whole))
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in whole["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in whole["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = whole["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _add_special(writer, tokenizer)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(whole: dict[str, Any]) -> str:
    """The name of what splits text before tokens are merged."""
    model = whole["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise _refused(f"the model {model['type']}" + (" with byte_fallback" if model.get("byte_fallback") else ""))
    # NFC leaves nearly all text as it is, and llama.cpp leaves out what it would change.
    if (whole["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _refused(f"the normalizer {whole['normalizer']['type']}")
    step = whole["pre_tokenizer"] or {"type": "none"}
    steps = tuple(map(_step, step["pretokenizers"] if step["type"] == "Sequence" else [step]))
    name = _PRE.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise _refused(f"the pre-tokenizer {', '.join(kind for kind, _ in steps)}")
    return name


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "ByteLevel", regex
        case {"type": "Digits", "individual_digits": each}:
            return "Digits", each
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return "Split", pattern
    return step["type"], None


def _add_special(writer: Any, tokenizer: Any) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(whole[0] == bos and plain[0] != bos)
    writer.add_add_eos_token(whole[-1] == eos and plain[-1] != eos)
    writer.add_add_space_prefix(False)


def _refused(found: str) -> RecipeError:
    names = ", ".join(sorted(set(_PRE.values())))
    return RecipeError(
        f"GGUF files are written with byte-level BPE tokenizers of the kinds {names}",
        where="tokenizer",
        found=found,
        remedy="choose another backend",
    )
