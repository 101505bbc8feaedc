"""The events of a response, as tokens come: https://platform.openai.com/docs/api-reference/responses-streaming"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optkit.engine.openai.responses import ResponsesBody, message, output_text, response, response_logprobs
from optkit.engine.outputs import Delta

__all__ = ["ResponsesStream"]

Event = tuple[str, dict[str, Any]]


class ResponsesStream:
    """Events with their names.

    Args:
        body: what was asked.
        head: `id`, `created` and `model`.
        tokenizer: for the texts of tokens with log probabilities.
        prompt_tokens: length of the prompt.
    """

    def __init__(self, body: ResponsesBody, head: Mapping[str, Any], tokenizer: Any, prompt_tokens: int) -> None:
        self._body, self._head, self._tokenizer = body, head, tokenizer
        self._prompt, self._cached, self._output = prompt_tokens, 0, 0
        self._text: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._number = 0
        self._place = {"item_id": message(head, [], "")["id"], "output_index": 0, "content_index": 0}

    def start(self) -> list[Event]:
        """The response has begun, and its text."""
        begun = response(self._body, self._head, "in_progress", [], None)
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=message(self._head, [], "in_progress")),
            self._event("response.content_part.added", **self._place, part=output_text("", [])),
        ]

    def add(self, delta: Delta) -> list[Event]:
        """What a delta says. One that ended by `error`, `deadline` or `cancelled` is for the caller to tell."""
        self._output += len(delta.tokens)
        if delta.prompt is not None:
            self._cached = delta.prompt.cached
        known = response_logprobs(delta.logprobs, self._tokenizer)
        made: list[Event] = []
        if delta.text or known:
            self._text.append(delta.text)
            self._logprobs += known
            made.append(
                self._event("response.output_text.delta", **self._place, delta=delta.text, logprobs=_brief(known))
            )
        if delta.finished in ("stop", "length"):
            made += self._close("completed" if delta.finished == "stop" else "incomplete")
        return made

    def end(self) -> list[Event]:
        """Nothing: the event after which none comes went with the last delta."""
        return []

    def _close(self, status: str) -> list[Event]:
        text = "".join(self._text)
        part = output_text(text, self._logprobs)
        item = message(self._head, [part], status)
        tokens = (self._prompt, self._cached, self._output)
        whole = response(self._body, self._head, status, [item], tokens)
        return [
            self._event("response.output_text.done", **self._place, text=text, logprobs=_brief(self._logprobs)),
            self._event("response.content_part.done", **self._place, part=part),
            self._event("response.output_item.done", output_index=0, item=item),
            self._event(f"response.{status}", response=whole),
        ]

    def _event(self, name: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return name, {"type": name, "sequence_number": number, **fields}


def _brief(known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events of text have no bytes."""
    return [
        {
            "token": one["token"],
            "logprob": one["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in one["top_logprobs"]],
        }
        for one in known
    ]
