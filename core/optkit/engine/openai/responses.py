"""Responses, text in and text out: https://platform.openai.com/docs/api-reference/responses

Nothing is stored, whatever `store` says, and answers say so. What would need a store (`previous_response_id`,
`conversation`, `background`) or another model (`reasoning`, `tools`) is refused where it asks for something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from optkit.engine.openai.bodies import Body
from optkit.engine.openai.fields import Label, Name, Schema, Small, StreamOptions, Strict, Text
from optkit.engine.openai.tokens import token_text
from optkit.engine.outputs import Completion
from optkit.engine.request import Structure, TokenLogprob
from optkit.engine.text import Chat, Prompt

__all__ = ["ResponsesBody", "message", "output_text", "response", "response_logprobs", "responses_answer"]

_COUNT = 1 << 31


class Part(Strict):
    """One part of an item's content."""

    type: Literal["input_text", "output_text"]
    text: Text
    # Of an output that comes back.
    annotations: Small | None = None
    logprobs: Annotated[list[Any], Field(max_length=1 << 20)] | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _text_only(cls, kind: Any) -> Any:
        if kind not in ("input_text", "output_text"):
            raise ValueError("this model takes text only")
        return kind


class Item(Strict):
    """One message of the input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=1024)]
    # Of an output that comes back.
    id: Label | None = None
    status: Label | None = None
    phase: Label | None = None

    @field_validator("type", mode="before")
    @classmethod
    def _messages_only(cls, kind: Any) -> Any:
        if kind != "message":
            raise ValueError("this model takes messages only")
        return kind

    def plain(self) -> dict[str, Any]:
        """As chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(Strict):
    """What the output must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    description: Label | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None and self.name is not None):
            raise ValueError("type json_schema and the fields name and schema go together")
        return self

    def structure(self) -> Structure | None:
        """For the engine; None if anything may come."""
        if self.schema_ is not None:
            return Structure(json_schema=self.schema_)
        return Structure(json_schema={"type": "object"}) if self.type == "json_object" else None


class TextConfig(Strict):
    """Of the output's text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None
    """The model has only its own."""


class ResponsesBody(Body):
    """Of `/v1/responses`."""

    answer: ClassVar[str] = "response"
    prefix: ClassVar[str] = "resp_"

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=_COUNT)
    text: TextConfig | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    # Only as long as they ask for nothing.
    background: Literal[False] | None = None
    conversation: None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @field_validator("background", "conversation", "previous_response_id", mode="before")
    @classmethod
    def _nothing_stored(cls, value: Any) -> Any:
        if value:
            raise ValueError("this server stores no responses; send the whole conversation as input")
        return value or None

    @field_validator("tools", mode="before")
    @classmethod
    def _no_tools(cls, value: Any) -> Any:
        if value:
            raise ValueError("not supported here; use /v1/chat/completions")
        return value

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has the log probability of each token."""
        return bool(self.include) or bool(self.top_logprobs)

    def prompts(self) -> list[Prompt]:
        """One chat, the instructions before all else."""
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [Chat([*first, {"role": "user", "content": self.input}])]
        return [Chat([*first, *(item.plain() for item in self.input)])]

    def _wishes(self, room: int, tokenizer: Any) -> dict[str, Any]:
        form = None if self.text is None else self.text.format
        given = {
            "max_tokens": self.max_output_tokens or room,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "logprobs": (self.top_logprobs or 0) if self.wants_logprobs else None,
            "structure": None if form is None else form.structure(),
        }
        return {name: value for name, value in given.items() if value is not None}


def responses_answer(body: ResponsesBody, completion: Completion, tokenizer: Any, **head: Any) -> dict[str, Any]:
    """The answer to a request for a response.

    Args:
        body: what was asked.
        completion: of its prompt.
        tokenizer: for the texts of tokens with log probabilities.
        head: `id`, `created` and `model`.
    """
    [sample] = completion.samples
    part = output_text(sample.text, response_logprobs(sample.logprobs or (), tokenizer))
    status = "completed" if sample.finish_reason == "stop" else "incomplete"
    return response(
        body,
        head,
        status,
        [message(head, [part], status)],
        (completion.prompt_tokens, completion.cached_tokens, len(sample.tokens)),
    )


def response(
    body: ResponsesBody,
    head: Mapping[str, Any],
    status: str,
    output: list[dict[str, Any]],
    tokens: tuple[int, int, int] | None,
) -> dict[str, Any]:
    """The object `response`.

    Args:
        body: what was asked.
        head: `id`, `created` and `model`.
        status: `in_progress`, `completed` or `incomplete`.
        output: its items.
        tokens: of the prompt, of these from the prefix cache, and of the output; None as long as they are not known.
    """
    form = {"type": "text"}
    if body.text is not None and body.text.format is not None:
        form = body.text.format.model_dump(by_alias=True, exclude_unset=True)
    return {
        "id": head["id"],
        "object": body.answer,
        "created_at": head["created"],
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "model": head["model"],
        "output": output,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": form, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None if tokens is None else _usage(*tokens),
        "user": body.user,
        "metadata": body.metadata or {},
    }


def message(head: Mapping[str, Any], content: list[dict[str, Any]], status: str) -> dict[str, Any]:
    """The only item of an output."""
    return {
        "id": f"msg_{str(head['id']).removeprefix(ResponsesBody.prefix)}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def output_text(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The only part of a message."""
    return {"type": "output_text", "annotations": [], "logprobs": logprobs, "text": text}


def response_logprobs(known: Sequence[TokenLogprob], tokenizer: Any) -> list[dict[str, Any]]:
    """Of tokens; `bytes` of a token that is only a part of a character are empty, since they cannot be null here."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text["token"], "bytes": text["bytes"] or [], "logprob": logprob}

    return [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
        for one in known
    ]


def _usage(prompt: int, cached: int, output: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + output,
    }
