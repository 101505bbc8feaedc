"""From OpenAI's words for a request to what the engine takes.

Fields that this engine cannot honour are refused rather than dropped: a client must not believe that they worked. Let
through is what says nothing about the output: `user`, `safety_identifier`, `metadata`, `store` (nothing is stored),
`prompt_cache_key` and `prompt_cache_retention` (prefixes are cached anyway), and `service_tier`, of which there is one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from optkit.engine.openai.faults import fault
from optkit.engine.openai.fields import Label, Metadata, ResponseFormat, Stop, StreamOptions, Strict, Token
from optkit.engine.request import SamplingParams
from optkit.engine.text import Prompt
from optkit.errors import RequestError

__all__ = ["Body", "Sampled"]

_SEEDS = 1 << 64
_COUNT = 1 << 31


class Body(Strict):
    """What every request to a language model has in common. A field that is null counts as not given."""

    answer: ClassVar[str]
    """`object` of the answer."""
    prefix: ClassVar[str]
    """What ids of answers begin with."""

    model: Label | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None

    @model_validator(mode="after")
    def _streamed(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """Each is a request of its own."""

    def params(self, prompt_tokens: int, max_length: int, tokenizer: Any) -> SamplingParams:
        """How to sample.

        Args:
            prompt_tokens: length of the prompt.
            max_length: of a sequence; what the prompt leaves of it is the default of `max_tokens` in a chat.
            tokenizer: from `optkit.engine.text.load_tokenizer`; its chat template says how a call of a tool looks.

        Raises:
            RequestError: the fields contradict each other, or the model cannot do it.
        """
        try:
            return SamplingParams(**self._wishes(max(1, max_length - prompt_tokens), tokenizer))
        except ValidationError as error:
            raise RequestError(fault(error)[0]) from error

    @abstractmethod
    def _wishes(self, room: int, tokenizer: Any) -> dict[str, Any]:
        """Keyword arguments of `SamplingParams`."""


class Sampled(Body):
    """What chats and completions have in common."""

    max_tokens: int | None = Field(default=None, ge=1, lt=_COUNT)
    n: int | None = Field(default=None, ge=1, le=128)
    seed: int | None = Field(default=None, ge=-_SEEDS // 2, lt=_SEEDS)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[Label, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    # Not OpenAI's, but known to most engines.
    top_k: int | None = Field(default=None, ge=-1, lt=_COUNT)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    min_tokens: int | None = Field(default=None, ge=0, lt=_COUNT)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None

    def _wishes(self, room: int, tokenizer: Any) -> dict[str, Any]:
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


def _biases(given: dict[str, float]) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdecimal()):
            raise RequestError("logit_bias: keys are token ids", found=token)
    return {int(token): bias for token, bias in given.items()}
