"""Chats: https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from optkit.engine.openai.bodies import Sampled
from optkit.engine.openai.fields import Label, Name, Small, Strict, Text
from optkit.engine.openai.tokens import chat_logprobs, usage
from optkit.engine.openai.tools import NamedTool, Tool, Tooling, called
from optkit.engine.outputs import Completion, Sample
from optkit.engine.text import Chat, Prompt

__all__ = ["ChatBody", "chat_answer"]

_COUNT = 1 << 31
_EXTRAS = 16


class TextPart(Strict):
    """One part of a message."""

    type: Literal["text"]
    text: Text

    @field_validator("type", mode="before")
    @classmethod
    def _text_only(cls, kind: Any) -> Any:
        if kind != "text":
            raise ValueError("this model takes text only")
        return kind


class CalledFunction(Strict):
    """What was called, and with what."""

    name: Name
    arguments: Text
    """A JSON object as text."""


class Called(Strict):
    """A call in the history."""

    id: Label | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Clients that put streamed calls together leave it there."""


class ChatMessage(Strict):
    """One turn. What else it holds is for the model's chat template."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Label, Small]

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    tool_calls: Annotated[list[Called], Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def _few_extras(self) -> ChatMessage:
        if len(self.model_extra or {}) > _EXTRAS:
            raise ValueError(f"has more than {_EXTRAS} fields of its own")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates know it: parts of text are put together, and OpenAI's `developer` is `system`."""
        message = {name: value for name, value in self.model_dump().items() if value is not None}
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        if self.role == "developer":
            message["role"] = "system"
        for call in message.get("tool_calls", []):
            del call["index"]
        # Many templates write "None" otherwise, or fail.
        return {"content": "", **message}


class ChatBody(Sampled):
    """Of `/v1/chat/completions`."""

    answer: ClassVar[str] = "chat.completion"
    prefix: ClassVar[str] = "chatcmpl-"

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=_COUNT)
    """The newer name of `max_tokens`, and the one that counts."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """With `none` the model is not shown the tools."""
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    # Not OpenAI's, but known to most engines.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """The output goes on with the last message."""

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("add_generation_prompt begins a message and continue_final_message goes on with one")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError("tool_choice names a function that is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice needs tools")
        if self.usable and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("response_format excludes tools, unless tool_choice is none")
        return self

    @property
    def usable(self) -> list[Tool]:
        """Tools that may be called."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or [] if tool.function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else self.tools or []

    def tooling(self, tokenizer: Any) -> Tooling | None:
        """How tools are called, if there are any.

        Raises:
            RequestError: as `Tooling`.
        """
        if not self.usable:
            return None
        forced = self.tool_choice not in (None, "auto")
        several = self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)
        return Tooling(self.usable, forced=forced, parallel=several, tokenizer=tokenizer)

    def prompts(self) -> list[Prompt]:
        """One chat. A named function is the only tool that the model may call, but all are shown."""
        shown = [] if self.tool_choice == "none" else self.tools or []
        return [
            Chat(
                [message.plain() for message in self.messages],
                [tool.model_dump(exclude_unset=True) for tool in shown],
                bool(self.continue_final_message),
                self.add_generation_prompt is not False,
            )
        ]

    def _wishes(self, room: int, tokenizer: Any) -> dict[str, Any]:
        most = self.max_completion_tokens or self.max_tokens or room
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        wishes = {**super()._wishes(room, tokenizer), "max_tokens": most, "logprobs": logprobs}
        tooling = self.tooling(tokenizer)
        structure = None if tooling is None else tooling.structure()
        return wishes if structure is None else {**wishes, "structure": structure}


def chat_answer(body: ChatBody, completion: Completion, tokenizer: Any, **head: Any) -> dict[str, Any]:
    """The answer to a chat.

    Args:
        body: what was asked.
        completion: of its prompt.
        tokenizer: for the texts of tokens with log probabilities, and how calls of tools look.
        head: `id`, `created`, `model` and what else stands at the top.
    """
    tooling = body.tooling(tokenizer)
    choices = [_choice(sample, tooling, tokenizer, head) for sample in completion.samples]
    return {**head, "object": body.answer, "choices": choices, "usage": usage([completion])}


def _choice(sample: Sample, tooling: Tooling | None, tokenizer: Any, head: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": sample.text, "refusal": None}
    finish: str = sample.finish_reason
    if tooling is not None:
        content, calls = called(tooling.parser(), sample.text, head["id"], sample.index)
        if calls:
            message |= {"content": content, "tool_calls": calls}
            finish = "tool_calls" if finish == "stop" else finish
    return {
        "index": sample.index,
        "message": message,
        "logprobs": None if sample.logprobs is None else chat_logprobs(sample.logprobs, tokenizer),
        "finish_reason": finish,
    }
