"""Completions: https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from optkit.engine.openai.bodies import Sampled
from optkit.engine.openai.fields import MAX_PROMPTS, Text, Tokens
from optkit.engine.openai.tokens import counts, text_logprobs, usage
from optkit.engine.outputs import Completion, Sample
from optkit.engine.text import Prompt

__all__ = ["CompletionBody", "completion_answer"]

_COUNT = 1 << 31


class CompletionBody(Sampled):
    """Of `/v1/completions`."""

    answer: ClassVar[str] = "text_completion"
    prefix: ClassVar[str] = "cmpl-"

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS)]
    ) = Field(union_mode="left_to_right")
    max_tokens: int | None = Field(default=None, ge=0, lt=_COUNT)
    """0, with `echo`, only scores the prompt. The engine makes one token all the same, which no answer shows."""
    best_of: int | None = Field(default=None, ge=1, le=128)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _consistent(self) -> CompletionBody:
        if not self.prompt or (isinstance(self.prompt, list) and [] in self.prompt):
            raise ValueError("the prompt is empty")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo to be true, or there is nothing to answer")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise ValueError("the best of several can be told at the end only; remove best_of or stream")
        return self

    @property
    def silent(self) -> bool:
        """Whether the answer holds the prompt alone."""
        return self.max_tokens == 0

    def prompts(self) -> list[Prompt]:
        """As they stand."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def _wishes(self, room: int, tokenizer: Any) -> dict[str, Any]:
        most = min(16, room) if self.max_tokens is None else max(1, self.max_tokens)
        wishes = {**super()._wishes(room, tokenizer), "max_tokens": most, "logprobs": self.logprobs}
        if self.best_of is not None:
            wishes["best_of"] = self.best_of
        if self.echo and self.logprobs is not None:
            wishes["prompt_logprobs"] = self.logprobs
        return wishes


def completion_answer(
    body: CompletionBody,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    tokenizer: Any,
    **head: Any,
) -> dict[str, Any]:
    """The answer to a completion request.

    Args:
        body: what was asked.
        prompts: token ids of each prompt.
        completions: of each prompt.
        tokenizer: for the texts of tokens.
        head: `id`, `created`, `model` and what else stands at the top.
    """
    choices: list[dict[str, Any]] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        echoed = prompt if body.echo else ()
        for sample in completion.samples:
            text = tokenizer.decode(echoed, skip_special_tokens=True) if echoed else ""
            choices.append(
                {
                    "index": len(choices),
                    "text": text if body.silent else text + sample.text,
                    "logprobs": _logprobs(body, echoed, completion, sample, tokenizer),
                    "finish_reason": "length" if body.silent else sample.finish_reason,
                }
            )
    spent = usage(completions)
    if body.silent:
        spent = counts(spent["prompt_tokens"], 0, spent["prompt_tokens_details"]["cached_tokens"])
    return {**head, "object": body.answer, "choices": choices, "usage": spent}


def _logprobs(
    body: CompletionBody, echoed: Sequence[int], completion: Completion, sample: Sample, tokenizer: Any
) -> dict[str, Any] | None:
    if sample.logprobs is None:
        return None
    before = (completion.prompt_logprobs or ()) if echoed else ()
    known = before if body.silent else (*before, *sample.logprobs)
    return text_logprobs(echoed[:1], known, tokenizer)[0]
