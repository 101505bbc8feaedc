"""Tokens, their log probabilities and their counts in OpenAI's words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from optkit.engine.outputs import Completion
from optkit.engine.request import TokenLogprob

__all__ = ["chat_logprobs", "counts", "text_logprobs", "token_text", "usage"]

_CACHED = 1 << 16
_texts: WeakKeyDictionary[Any, dict[int, dict[str, Any]]] = WeakKeyDictionary()


def token_text(tokenizer: Any, token: int) -> dict[str, Any]:
    """`token` and `bytes` of one token; bytes are null where it is only a part of a character. Not to be changed."""
    known = _texts.setdefault(tokenizer, {})
    found = known.get(token)
    if found is None:
        if len(known) >= _CACHED:
            known.clear()
        text: str = tokenizer.decode([token])
        found = known[token] = {"token": text, "bytes": None if "\ufffd" in text else list(text.encode())}
    return found


def counts(prompt: int, output: int, cached: int) -> dict[str, Any]:
    """`usage` from numbers of tokens; `cached` are those of the prompt that came from the prefix cache."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def usage(completions: Sequence[Completion]) -> dict[str, Any]:
    """Token counts of an answer."""
    prompt = sum(one.prompt_tokens for one in completions)
    output = sum(len(sample.tokens) for one in completions for sample in one.samples)
    return counts(prompt, output, sum(one.cached_tokens for one in completions))


def chat_logprobs(known: Iterable[TokenLogprob], tokenizer: Any) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = [
        {
            **token_text(tokenizer, one.token),
            "logprob": one.logprob,
            "top_logprobs": [{**token_text(tokenizer, token), "logprob": logprob} for token, logprob in one.top],
        }
        for one in known
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    first: Sequence[int], known: Sequence[TokenLogprob], tokenizer: Any, begin: int = 0
) -> tuple[dict[str, Any], int]:
    """`logprobs` of a completion's choice, and where the text goes on.

    Args:
        first: the prompt's first token, which has no probability, where the prompt is part of the text.
        known: all other tokens.
        tokenizer: for their texts.
        begin: where the text of the first one begins.
    """
    tokens = [token_text(tokenizer, token)["token"] for token in (*first, *(one.token for one in known))]
    offsets = []
    for text in tokens:
        offsets.append(begin)
        begin += len(text)
    tops = [{token_text(tokenizer, token)["token"]: logprob for token, logprob in one.top} for one in known]
    unknown: list[None] = [None] * len(first)
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [*unknown, *(one.logprob for one in known)],
        "top_logprobs": [*unknown, *tops],
        "text_offset": offsets,
    }
    return logprobs, begin
