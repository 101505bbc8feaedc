"""Answers in chunks, as tokens come: `stream` of chats and completions.

A delta that ended by `error`, `deadline` or `cancelled` makes no chunk that says so: whoever has the stream looks at
`delta.finished` before, and ends it with an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optkit.engine.openai.calls import CallParser, Piece
from optkit.engine.openai.chat import ChatBody
from optkit.engine.openai.completion import CompletionBody
from optkit.engine.openai.tokens import chat_logprobs, counts, text_logprobs
from optkit.engine.openai.tools import call_id
from optkit.engine.outputs import Delta
from optkit.engine.request import PromptFacts

__all__ = ["ChatStream", "CompletionStream"]

_ENDS = ("stop", "length")


class _Chunks:
    """What all chunks of one answer have in common, and how many tokens there were."""

    def __init__(self, body: ChatBody | CompletionBody, kind: str, head: Mapping[str, Any], prompt_tokens: int) -> None:
        self._head = {**head, "object": kind}
        options = body.stream_options
        self._asked = options is not None and options.include_usage
        self.continuous = options is not None and options.continuous_usage_stats
        self._prompt, self.output, self.cached = prompt_tokens, 0, 0

    def chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        made = {**self._head, "choices": list(choices)}
        if self.continuous:
            made["usage"] = self._usage()
        elif self._asked:
            made["usage"] = None
        return made

    def last(self) -> list[dict[str, Any]]:
        return [{**self._head, "choices": [], "usage": self._usage()}] if self._asked else []

    def _usage(self) -> dict[str, Any]:
        return counts(self._prompt, self.output, self.cached)


class ChatStream:
    """The chunks of a chat.

    Args:
        body: what was asked.
        head: `id`, `created`, `model` and what else stands at the top.
        tokenizer: for the texts of tokens with log probabilities, and how calls of tools look.
        prompt_tokens: length of the prompt.

    Raises:
        RequestError: the model's template takes no tools; `body.params` has said so before.
    """

    def __init__(self, body: ChatBody, head: Mapping[str, Any], tokenizer: Any, prompt_tokens: int) -> None:
        self._chunks = _Chunks(body, "chat.completion.chunk", head, prompt_tokens)
        self._answer, self._count, self._tokenizer = str(head["id"]), body.n or 1, tokenizer
        tooling = body.tooling(tokenizer)
        self._parsers: list[CallParser] | None = (
            None if tooling is None else [tooling.parser() for _ in range(self._count)]
        )

    def start(self) -> list[dict[str, Any]]:
        """Who speaks, for each choice."""
        role = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, role) for index in range(self._count)]

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """What a delta says."""
        chunks, index = self._chunks, delta.sample
        chunks.output += len(delta.tokens)
        if delta.prompt is not None:
            chunks.cached = delta.prompt.cached
        ended = delta.finished in _ENDS
        finish: str | None = delta.finished if ended else None
        if self._parsers is None:
            said = [{"content": delta.text}] if delta.text else []
        else:
            parser = self._parsers[index]
            pieces = parser.push(delta.text)
            if ended:
                pieces += parser.end()
                finish = "tool_calls" if parser.calls and finish == "stop" else finish
            said = [self._said(index, piece) for piece in pieces]
        logprobs = chat_logprobs(delta.logprobs, self._tokenizer) if delta.logprobs else None
        if not said and (logprobs is not None or (chunks.continuous and delta.tokens)):
            said = [{"content": ""}]
        made = [self._chunk(index, one, None if place else logprobs) for place, one in enumerate(said)]
        if finish is not None:
            made.append(self._chunk(index, {}, finish=finish))
        return made

    def end(self) -> list[dict[str, Any]]:
        """The count of tokens, where it is asked for."""
        return self._chunks.last()

    def _said(self, index: int, piece: Piece) -> dict[str, Any]:
        if piece.call is None:
            return {"content": piece.text}
        call: dict[str, Any] = {"index": piece.call, "function": {"arguments": piece.text}}
        if piece.name:
            call |= {"id": call_id(self._answer, index, piece.call), "type": "function"}
            call["function"] = {"name": piece.name, "arguments": piece.text}
        return {"tool_calls": [call]}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return self._chunks.chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})


class CompletionStream:
    """The chunks of a completion request, whose prompts are answered side by side.

    Args:
        body: what was asked.
        head: `id`, `created`, `model` and what else stands at the top.
        tokenizer: for the texts of tokens.
        prompts: token ids of each prompt.
    """

    def __init__(
        self, body: CompletionBody, head: Mapping[str, Any], tokenizer: Any, prompts: Sequence[Sequence[int]]
    ) -> None:
        self._chunks = _Chunks(body, body.answer, head, sum(map(len, prompts)))
        self._body, self._tokenizer, self._prompts = body, tokenizer, prompts
        self._count = body.n or 1
        self._facts: dict[int, PromptFacts] = {}
        self._offsets: dict[int, int] = {}  # where a choice's text goes on; without one it has not begun

    def start(self) -> list[dict[str, Any]]:
        """Nothing: each choice begins with its text."""
        return []

    def add(self, prompt_index: int, delta: Delta) -> list[dict[str, Any]]:
        """What a delta of one of the prompts says."""
        chunks, body, index = self._chunks, self._body, prompt_index * self._count + delta.sample
        if delta.prompt is not None:
            self._facts[prompt_index] = delta.prompt
            chunks.cached += delta.prompt.cached
        made = []
        if index not in self._offsets:
            self._offsets[index] = 0
            if body.echo:
                made.append(self._echo(prompt_index, index))
        finish = delta.finished if delta.finished in _ENDS else None
        if body.silent:
            return [*made, self._chunk(index, "", None, "length")] if finish else made
        chunks.output += len(delta.tokens)
        logprobs = None
        if delta.logprobs and body.logprobs is not None:
            logprobs, self._offsets[index] = text_logprobs((), delta.logprobs, self._tokenizer, self._offsets[index])
        if delta.text or logprobs is not None or finish or (chunks.continuous and delta.tokens):
            made.append(self._chunk(index, delta.text, logprobs, finish))
        return made

    def end(self) -> list[dict[str, Any]]:
        """The count of tokens, where it is asked for."""
        return self._chunks.last()

    def _echo(self, prompt_index: int, index: int) -> dict[str, Any]:
        prompt, logprobs = self._prompts[prompt_index], None
        if self._body.logprobs is not None:
            facts = self._facts.get(prompt_index)
            known = (facts.logprobs if facts else None) or ()
            logprobs, self._offsets[index] = text_logprobs(prompt[:1], known, self._tokenizer)
        return self._chunk(index, self._tokenizer.decode(prompt, skip_special_tokens=True), logprobs, None)

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return self._chunks.chunk({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})
