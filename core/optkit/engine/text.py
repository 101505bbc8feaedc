"""Between text and token ids: chat templates in, streamed text out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

from optkit.errors import MissingError, RequestError

__all__ = ["Detokenizer", "Message", "Prompt", "TextStream", "chat", "encode", "end_tokens", "load_tokenizer"]

Message: TypeAlias = Mapping[str, Any]
"""`role`, `content` and whatever else the model's chat template knows."""
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]


def load_tokenizer(weights: Path) -> Any:
    """The transformers tokenizer of a weights folder.

    Raises:
        MissingError: the folder has none.
    """
    from transformers import AutoTokenizer

    if not any((weights / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise MissingError("the model has no tokenizer", where=str(weights), remedy="apply a model that carries one")
    return AutoTokenizer.from_pretrained(weights)


def encode(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt.

    Args:
        tokenizer: from `load_tokenizer`.
        prompt: text, which is continued as it is; token ids; or chat messages, which go through the chat template with
            the beginning of the assistant's turn after them.

    Raises:
        RequestError: the model has no chat template, its template does not take these messages, or the text is not
            Unicode.
    """
    if isinstance(prompt, str):
        return _tokens(tokenizer, prompt)
    if not prompt or isinstance(prompt[0], int):
        return tuple(cast("Sequence[int]", prompt))
    if not tokenizer.chat_template:
        raise RequestError("the model has no chat template", remedy="give text or token ids instead of messages")
    try:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs of the model's author, and raise what they like
        raise RequestError(f"the chat template refuses the messages ({error})") from error
    return _tokens(tokenizer, text, add_special_tokens=False)


def _tokens(tokenizer: Any, text: str, **options: Any) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can say it, and tokenizers raise TypeError
        raise RequestError("the text holds half of a surrogate pair, which is no character") from error
    return tuple(tokenizer(text, **options).input_ids)


def chat(text: str) -> list[Message]:
    """One turn of a user."""
    return [{"role": "user", "content": text}]


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


class TextStream:
    """The text of one sample, token by token, up to the first of its stop strings.

    What could be the beginning of a stop string is held back until it is known not to be.

    Args:
        tokenizer: from `load_tokenizer`.
        stop: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; what is pushed after it is ignored."""

    def push(self, token: int, *, watch: bool = True) -> str:
        """The text that this token adds. Without `watch` stop strings are let through."""
        return self._checked(self._detokenizer.push(token), watch=watch)

    def flush(self) -> str:
        """What is still held back, at the end of the output."""
        rest = self._checked(self._detokenizer.flush(), watch=True)
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _checked(self, new: str, *, watch: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        if not (self._stop and watch):
            return text
        places = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        held = max(_overlap(text, stop) for stop in self._stop)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
