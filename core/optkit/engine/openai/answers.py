"""From what the engine gave to the objects that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optkit.engine.openai.requests import ChatBody, CompletionBody
from optkit.engine.outputs import Completion, Sample
from optkit.engine.request import TokenLogprob

__all__ = ["chat_answer", "completion_answer", "token_text", "usage"]


def chat_answer(body: ChatBody, completion: Completion, tokenizer: Any, **head: Any) -> dict[str, Any]:
    """The answer to a chat.

    Args:
        body: what was asked.
        completion: of its prompt.
        tokenizer: for the texts of tokens with log probabilities.
        head: `id`, `created`, `model` and what else stands at the top.
    """
    choices = [
        {
            "index": sample.index,
            "message": {"role": "assistant", "content": sample.text, "refusal": None},
            "logprobs": _chat_logprobs(sample, tokenizer),
            "finish_reason": sample.finish_reason,
        }
        for sample in completion.samples
    ]
    return {**head, "object": body.answer, "choices": choices, "usage": usage([completion])}


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
                    "text": text + sample.text,
                    "logprobs": _text_logprobs(echoed, completion, sample, tokenizer),
                    "finish_reason": sample.finish_reason,
                }
            )
    return {**head, "object": body.answer, "choices": choices, "usage": usage(completions)}


def usage(completions: Sequence[Completion]) -> dict[str, Any]:
    """Token counts of an answer."""
    prompt = sum(one.prompt_tokens for one in completions)
    output = sum(len(sample.tokens) for one in completions for sample in one.samples)
    cached = sum(one.cached_tokens for one in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def token_text(tokenizer: Any, token: int) -> dict[str, Any]:
    """`token` and `bytes` of one token; bytes are null where it is only a part of a character."""
    text: str = tokenizer.decode([token])
    return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode())}


def _chat_logprobs(sample: Sample, tokenizer: Any) -> dict[str, Any] | None:
    if sample.logprobs is None:
        return None
    content = [
        {
            **token_text(tokenizer, one.token),
            "logprob": one.logprob,
            "top_logprobs": [{**token_text(tokenizer, token), "logprob": logprob} for token, logprob in one.top],
        }
        for one in sample.logprobs
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(
    echoed: Sequence[int], completion: Completion, sample: Sample, tokenizer: Any
) -> dict[str, Any] | None:
    if sample.logprobs is None:
        return None
    before: tuple[TokenLogprob, ...] = (completion.prompt_logprobs or ()) if echoed else ()
    known = (*before, *sample.logprobs)
    tokens = [token_text(tokenizer, token)["token"] for token in (*echoed[:1], *(one.token for one in known))]
    first = [None] if echoed else []
    tops = [{token_text(tokenizer, token)["token"]: logprob for token, logprob in one.top} for one in known]
    offsets, end = [], 0
    for token in tokens:
        offsets.append(end)
        end += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [*first, *(one.logprob for one in known)],
        "top_logprobs": [*first, *tops],
        "text_offset": offsets,
    }
