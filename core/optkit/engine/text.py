"""Between text and token ids: chat templates in, streamed text out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optkit.errors import MissingError

__all__ = ["Detokenizer", "encode", "end_tokens", "load_tokenizer"]


def load_tokenizer(weights: Path) -> Any:
    """The transformers tokenizer of a weights folder.

    Raises:
        MissingError: the folder has none.
    """
    from transformers import AutoTokenizer

    if not any((weights / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise MissingError("the model has no tokenizer", where=str(weights), remedy="apply a model that carries one")
    return AutoTokenizer.from_pretrained(weights)


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> tuple[int, ...]:
    """Token ids of a prompt.

    Args:
        tokenizer: from `load_tokenizer`.
        prompt: plain text.
        chat: put it into the chat template as the user's turn, where the model has one.
    """
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer(prompt, add_special_tokens=False).input_ids)
    return tuple(tokenizer(prompt).input_ids)


def end_tokens(weights: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's and those of the model's generation configuration."""
    ends = {tokenizer.eos_token_id}
    file = weights / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ends |= set(listed) if isinstance(listed, list) else {listed}
    return tuple(sorted(end for end in ends if end is not None))


class Detokenizer:
    """Turns tokens into text as they come. A character that is cut across tokens is held back until it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._done = 0  # tokens whose text was given out whole; decoding restarts there, so that it stays linear
        self._given = ""

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        self._tokens.append(token)
        text = self._text()
        # The decoder writes U+FFFD for bytes that are no character yet.
        if text.endswith("\ufffd"):
            return ""
        return self._give(text)

    def flush(self) -> str:
        """What is still held back."""
        return self._give(self._text())

    def _text(self) -> str:
        decoded: str = self._tokenizer.decode(self._tokens[self._done :], skip_special_tokens=True)
        return decoded

    def _give(self, text: str) -> str:
        new = text[len(self._given) :]
        self._given = text
        # Restart at a word's beginning, keeping the last tokens as context: some tokenizers strip a leading space.
        if len(self._tokens) - self._done > 32:
            self._done = len(self._tokens) - 8
            self._given = self._text()
        return new
