"""What comes out as text: pieces while it is made, and the whole when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field

from optkit.engine.request import FinishReason, PromptFacts, SamplingParams, TokenLogprob

__all__ = ["Collector", "Completion", "Delta", "Sample"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step brought to one sample of one request."""

    request: int
    sample: int
    text: str
    """Possibly empty: a character, or what may become a stop string, is not complete yet."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of each token, where the request wants them."""
    finished: FinishReason | None = None
    """Of this sample."""
    last: bool = False
    """Nothing more comes of the request. Every request has exactly one such delta."""
    prompt: PromptFacts | None = None
    """With the request's first token."""
    error: str = ""
    """What went wrong, when `finished` is `error`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished output."""

    index: int
    """From 0, in the order of `Completion.samples`."""
    text: str
    tokens: tuple[int, ...]
    """Output token ids, the one that ended it included."""
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None
    """Of each token, where the request asked for them."""
    cumulative_logprob: float | None
    """Their sum, natural logarithm."""


@dataclass(frozen=True, slots=True)
class Completion:
    """Everything that a request gave."""

    samples: tuple[Sample, ...]
    """`n` of them; of `best_of` drawn ones, the best first."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that came from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None
    error: str
    """What went wrong; then the samples are what was there until then, their `finish_reason` is `error`."""

    @property
    def text(self) -> str:
        """Of the first sample."""
        return self.samples[0].text


@dataclass(slots=True)
class _Part:
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: FinishReason = "error"


class Collector:
    """Puts the deltas of one request together.

    Args:
        params: of the request.
        prompt_tokens: its length.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int) -> None:
        self._params = params
        self._prompt = PromptFacts(prompt_tokens, 0, None)
        self._parts = [_Part() for _ in range(params.samples)]
        self._error = ""

    def add(self, delta: Delta) -> Completion | None:
        """Take one delta; the last one gives the completion."""
        part = self._parts[delta.sample]
        part.text.append(delta.text)
        part.tokens += delta.tokens
        part.logprobs += delta.logprobs
        part.finished = delta.finished or part.finished
        self._prompt = delta.prompt or self._prompt
        self._error = delta.error or self._error
        return self._completion() if delta.last else None

    def _completion(self) -> Completion:
        parts = self._parts
        if self._params.samples > self._params.n:
            parts = sorted(parts, key=_mean_logprob, reverse=True)[: self._params.n]
        return Completion(
            tuple(self._sample(index, part) for index, part in enumerate(parts)),
            self._prompt.tokens,
            self._prompt.cached,
            self._prompt.logprobs,
            self._error,
        )

    def _sample(self, index: int, part: _Part) -> Sample:
        known = self._params.needs_logprobs
        return Sample(
            index,
            "".join(part.text),
            tuple(part.tokens),
            part.finished,
            tuple(part.logprobs) if self._params.logprobs is not None else None,
            sum(one.logprob for one in part.logprobs) if known else None,
        )


def _mean_logprob(part: _Part) -> float:
    return sum(one.logprob for one in part.logprobs) / max(1, len(part.logprobs))
