"""From OpenAI's words for a request to what the engine takes, and errors as its clients read them.

Fields that this engine cannot honour are refused rather than dropped: a client must not believe that they worked. What
says nothing about the output (`user`, `metadata`, `store`) is let through.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from optkit.engine.request import SamplingParams, Structure
from optkit.engine.text import Prompt
from optkit.errors import OptkitError, RequestError

__all__ = ["BODIES", "Body", "ChatBody", "CompletionBody", "error_body", "invalid"]

_SEEDS = 1 << 64


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(_Strict):
    """One part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn. What else it holds is for the model's chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates know it: parts of text are put together."""
        message = self.model_dump()
        if isinstance(self.content, list):
            message["content"] = "".join(part.text for part in self.content)
        return message


class JsonSchema(_Strict):
    """The schema of `response_format`."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the output must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema go together")
        return self

    def structure(self) -> Structure | None:
        if self.json_schema is not None:
            return Structure(json_schema=self.json_schema.schema_)
        return Structure(json_schema={"type": "object"}) if self.type == "json_object" else None


class StreamOptions(_Strict):
    """Of streamed answers."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Body(_Strict):
    """What both kinds of request have in common. A field that is null counts as not given."""

    answer: ClassVar[str]
    """`object` of the answer."""

    model: str | None = None
    """Echoed; one engine has one model."""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-_SEEDS // 2, lt=_SEEDS)
    stop: str | list[str] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    # Not OpenAI's, but known to most engines.
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None

    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """Each is a request of its own."""

    def params(self, prompt_tokens: int, max_length: int) -> SamplingParams:
        """How to sample.

        Args:
            prompt_tokens: length of the prompt.
            max_length: of a sequence; what the prompt leaves of it is the default of `max_tokens` in a chat.

        Raises:
            RequestError: the fields contradict each other.
        """
        try:
            return SamplingParams(**self._wishes(max(1, max_length - prompt_tokens)))
        except ValidationError as error:
            raise RequestError(_fault(error)[0]) from error

    def _wishes(self, room: int) -> dict[str, Any]:
        same = (
            "top_p",
            "n",
            "stop",
            "presence_penalty",
            "frequency_penalty",
            "min_p",
            "repetition_penalty",
            "min_tokens",
            "ignore_eos",
            "stop_token_ids",
        )
        given = {name: getattr(self, name) for name in same}
        given["temperature"] = 1.0 if self.temperature is None else self.temperature
        given["top_k"] = None if self.top_k is None else max(0, self.top_k)  # -1 is how other engines say "all"
        given["seed"] = None if self.seed is None else self.seed % _SEEDS
        given["logit_bias"] = None if self.logit_bias is None else _biases(self.logit_bias)
        given["structure"] = None if self.response_format is None else self.response_format.structure()
        return {name: value for name, value in given.items() if value is not None}


class ChatBody(Body):
    """Of `/v1/chat/completions`."""

    answer: ClassVar[str] = "chat.completion"

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of `max_tokens`, and the one that counts."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def prompts(self) -> list[Prompt]:
        return [[message.plain() for message in self.messages]]

    def _wishes(self, room: int) -> dict[str, Any]:
        most = self.max_completion_tokens or self.max_tokens or room
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return {**super()._wishes(room), "max_tokens": most, "logprobs": logprobs}


class CompletionBody(Body):
    """Of `/v1/completions`."""

    answer: ClassVar[str] = "text_completion"

    prompt: str | list[int] | list[str] | list[list[int]] = Field(union_mode="left_to_right")
    best_of: int | None = Field(default=None, ge=1, le=128)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _some_prompt(self) -> CompletionBody:
        if not self.prompt or (isinstance(self.prompt, list) and [] in self.prompt):
            raise ValueError("the prompt is empty")
        return self

    def prompts(self) -> list[Prompt]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def _wishes(self, room: int) -> dict[str, Any]:
        wishes = {**super()._wishes(room), "max_tokens": self.max_tokens or min(16, room), "logprobs": self.logprobs}
        if self.best_of is not None:
            wishes["best_of"] = self.best_of
        if self.echo and self.logprobs is not None:
            wishes["prompt_logprobs"] = self.logprobs
        return wishes


BODIES: dict[str, type[ChatBody] | type[CompletionBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
}


def error_body(message: str, *, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def invalid(error: ValidationError | OptkitError) -> dict[str, Any]:
    """The error body for a request that is wrong."""
    if isinstance(error, ValidationError):
        message, param = _fault(error)
        return error_body(message, param=param)
    return error_body(str(error))


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError as error:
        raise RequestError("logit_bias: keys are token ids", found=next(iter(given))) from error


def _fault(error: ValidationError) -> tuple[str, str | None]:
    """The first fault in words, and where it is."""
    fault = error.errors(include_url=False)[0]
    # Without the names that pydantic gives to the members of a union.
    where = ".".join(str(part) for part in fault["loc"] if part != "str" and "[" not in str(part)) or None
    message = "unknown field" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
    return (f"{where}: {message}" if where else message), where
