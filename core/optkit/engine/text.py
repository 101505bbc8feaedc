"""Between text and token ids: chat templates in, streamed text out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from optkit.errors import MissingError, RequestError

__all__ = [
    "Chat",
    "Detokenizer",
    "Message",
    "Prompt",
    "TextStream",
    "chat",
    "chat_template",
    "encode",
    "end_tokens",
    "kept_tokens",
    "load_tokenizer",
    "overlap",
]

Message: TypeAlias = Mapping[str, Any]
"""`role`, `content` and whatever else the model's chat template knows."""

_RENDERED = 16 << 20
"""Characters that a chat template may write."""
_MARKERS = frozenset({"<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"})
"""Around calls of tools. They are text for whoever reads the calls, also where they are special tokens."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns of a conversation, for the model's chat template."""

    messages: Sequence[Message]
    """`arguments` of `tool_calls` may be JSON texts, as OpenAI's clients send them; templates get them as objects."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the model may call, as OpenAI's clients describe them."""
    continue_final: bool = False
    """The last message is not over, and the output goes on with it."""
    add_generation_prompt: bool = True
    """After the messages the assistant's turn begins. Not where the last one goes on."""


Prompt: TypeAlias = str | Sequence[int] | Sequence[Message] | Chat


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
        prompt: text, which is continued as it is; token ids; or a chat, which goes through the chat template. Messages
            alone are a chat with the beginning of the assistant's turn after them.

    Raises:
        RequestError: the model has no chat template, its template does not take these messages or any tools, or the
            text is not Unicode.
    """
    if isinstance(prompt, str):
        return _tokens(tokenizer, prompt)
    if not isinstance(prompt, Chat):
        if not prompt or isinstance(prompt[0], int):
            return tuple(cast("Sequence[int]", prompt))
        prompt = Chat(cast("Sequence[Message]", prompt))
    return _tokens(tokenizer, _rendered(tokenizer, prompt), add_special_tokens=False)


def chat_template(tokenizer: Any, *, tools: bool) -> str:
    """The model's chat template: a Jinja program of the model's author.

    Args:
        tokenizer: from `load_tokenizer`.
        tools: the one that shows tools to the model.

    Raises:
        RequestError: the model has none, or not for tools.
    """
    if not tokenizer.chat_template:
        raise RequestError("the model has no chat template", remedy="give text or token ids instead of messages")
    found: str = tokenizer.get_chat_template(tools=[{}] if tools else None)
    if tools and not re.search(r"\btools\b", found):
        raise RequestError("this model's chat template takes no tools", remedy="remove them, or choose another model")
    return found


def _rendered(tokenizer: Any, given: Chat) -> str:
    from jinja2 import TemplateError

    # The templates themselves run in jinja2's ImmutableSandboxedEnvironment, which transformers makes.
    chat_template(tokenizer, tools=bool(given.tools))
    messages = [_with_arguments(message) for message in given.messages]
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tools=list(given.tools) or None,
            tokenize=False,
            add_generation_prompt=given.add_generation_prompt and not given.continue_final,
            continue_final_message=given.continue_final,
        )
    except Exception as error:  # templates are programs of the model's author, and raise what they like
        # What a template says by raise_exception is for the user. Anything else may show what it was working on.
        reason = f" ({error})" if type(error) is TemplateError else ""
        raise RequestError(f"the chat template refuses the messages{reason}") from error
    if len(text) > _RENDERED:
        raise RequestError(f"the chat template makes more than {_RENDERED} characters of the messages")
    return text


def _with_arguments(message: Message) -> dict[str, Any]:
    """What chat templates know: arguments of calls are objects."""
    plain = dict(message)
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call["function"].get("arguments"))}}
            for call in plain["tool_calls"]
        ]
    return plain


def _arguments(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RequestError("the arguments of a tool call in the messages are no JSON object")
    return found


def _tokens(tokenizer: Any, text: str, **options: Any) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can say it, and tokenizers raise TypeError
        raise RequestError("the text holds half of a surrogate pair, which is no character") from error
    # Not verbose: it would warn of a text that is too long, which is for the engine to refuse.
    return tuple(tokenizer(text, verbose=False, **options).input_ids)


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


def kept_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens that are text all the same, with it: those around calls of tools."""
    added = tokenizer.added_tokens_decoder.items()
    return {token: known.content for token, known in added if known.special and known.content in _MARKERS}


class Detokenizer:
    """Turns tokens into text as they come. A character that is cut across tokens is held back until it is whole.

    Args:
        tokenizer: from `load_tokenizer`.
        kept: from `kept_tokens`; all other special tokens are no text.
    """

    def __init__(self, tokenizer: Any, kept: Mapping[int, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._kept = kept or {}
        self._tokens: list[int] = []
        self._done = 0  # tokens whose text was given out whole; decoding restarts there, so that it stays linear
        self._given = ""

    def push(self, token: int) -> str:
        """The text that this token completes, possibly empty."""
        if token in self._kept:
            rest = self.flush()
            self._tokens, self._done, self._given = [], 0, ""
            return rest + self._kept[token]
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
        kept: from `kept_tokens`.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), kept: Mapping[int, str] | None = None) -> None:
        self._detokenizer = Detokenizer(tokenizer, kept)
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
        held = max(overlap(text, stop) for stop in self._stop)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
