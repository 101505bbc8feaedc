"""What goes into the engine and what comes out: requests and how they are sampled, tokens and how they end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, field_validator, model_validator

from optkit.options import Options

__all__ = ["Event", "FinishReason", "PromptFacts", "Request", "SamplingParams", "Structure", "TokenLogprob"]

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
"""`stop`: an end token, a stop string or the end of a structure; `length`: max_tokens; `deadline`: time ran out, and
what was there until then stands."""

_SEEDS = 1 << 64


def _listed(value: Any) -> Any:
    """One for a tuple of one, and a list for a tuple, as clients send them."""
    return (value,) if isinstance(value, str | int) else tuple(value) if isinstance(value, list) else value


class Structure(Options):
    """What the output must be, whatever the model prefers: exactly one of these."""

    json_schema: dict[str, Any] | None = None
    """A JSON Schema; `{"type": "object"}` is any object."""
    regex: str | None = None
    """A regular expression that the whole output matches."""
    choice: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """One of these texts."""
    grammar: str | None = None
    """A grammar in the Lark syntax of https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md"""

    @model_validator(mode="after")
    def _one(self) -> Structure:
        given = (self.json_schema is not None, self.regex is not None, bool(self.choice), self.grammar is not None)
        if sum(given) != 1:
            raise ValueError("give exactly one of json_schema, regex, choice and grammar")
        return self


class SamplingParams(Options):
    """How the output of one request is chosen.

    The order of work on logits: structure, min_tokens and logit_bias; repetition, then frequency and presence penalty;
    temperature; top_k, then top_p, then min_p, each on what the one before left.
    """

    max_tokens: int = Field(default=128, ge=1)
    """Output tokens at most."""
    min_tokens: int = Field(default=0, ge=0)
    """No end token and no stop token before this many."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token; above, logits are divided by it before sampling."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the most likely so many; 0 means all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probability reaches this (nucleus sampling, arXiv:1904.09751)."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Leave out tokens below this share of the most likely one's probability (arXiv:2407.01082)."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides positive and multiplies negative logits of all tokens seen, prompt included (arXiv:1909.05858)."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from the logits of every token that the output holds."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from a token's logit as often as the output holds it."""
    logit_bias: dict[int, float] = Field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = Field(default=None, ge=0, lt=_SEEDS)
    """A draw depends on this, on the sample and on the position alone, whatever else is in the batch. None: a new one
    for each request."""
    stop: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Output ends before the first of these strings."""
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_listed)] = ()
    """Output ends with the first of these tokens, which is counted and gives no text."""
    ignore_eos: bool = False
    """Go on past the model's end token. Benchmarks need it for equal work."""
    n: int = Field(default=1, ge=1, le=128)
    """Samples to give back."""
    best_of: int | None = Field(default=None, ge=1, le=128)
    """Samples to draw, of which the `n` with the highest mean log probability are given back."""
    logprobs: int | None = Field(default=None, ge=0, le=64)
    """Give the log probability of each output token, and of this many most likely ones; by the model's own
    distribution, before anything above changes it."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=64)
    """The same for the prompt's tokens. Such a request computes its whole prompt and takes nothing from a cache."""
    structure: Structure | None = None
    """What the output must be."""

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty string would stop at once; remove it")
        return stop

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of draws {self.best_of} samples and n gives {self.n} back; raise best_of")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; lower min_tokens")
        return self

    @property
    def samples(self) -> int:
        """Samples to draw."""
        return self.best_of or self.n

    @property
    def needs_logprobs(self) -> bool:
        """Whether the log probability of output tokens is wanted, by the user or to choose the best samples."""
        return self.logprobs is not None or self.samples > self.n

    @property
    def depends_on_history(self) -> bool:
        """Whether a token's distribution depends on the output before it by more than the model does."""
        penalized = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalized) or self.structure is not None


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids to continue."""

    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """From -100, first, to 100; what it decides is up to the batching strategy."""
    timeout: float | None = None
    """Seconds from its arrival, after which it ends with what it has."""
    salt: str = ""
    """Only requests with the same salt share cached prefixes: one per tenant keeps them from probing each other."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability of one token, natural logarithm, and the most likely ones in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """Token and log probability, most likely first."""


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What is known of a prompt once it is computed."""

    tokens: int
    cached: int
    """Of them, those whose keys and values came from the prefix cache."""
    logprobs: tuple[TokenLogprob, ...] | None
    """Where the request wants them: of each token but the first, which nothing comes before."""


class Event(NamedTuple):
    """Something that happened to one sample: a new token, its end, or both."""

    request: int
    sample: int
    token: int | None
    """None: it ended without one."""
    finished: FinishReason | None = None
    """Of this sample."""
    last: bool = False
    """Nothing more comes of the request. Every request has exactly one such event."""
    logprob: TokenLogprob | None = None
    """Where the request wants it."""
    prompt: PromptFacts | None = None
    """With the request's first token."""
    error: str = ""
    """What went wrong, when `finished` is `error`."""
