"""Which body belongs to which address, and which answer to which body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optkit.engine.openai.chat import ChatBody, chat_answer
from optkit.engine.openai.completion import CompletionBody, completion_answer
from optkit.engine.openai.responses import ResponsesBody, responses_answer
from optkit.engine.outputs import Completion

__all__ = ["BODIES", "LanguageBody", "answer"]

LanguageBody = ChatBody | CompletionBody | ResponsesBody

BODIES: dict[str, type[ChatBody] | type[CompletionBody] | type[ResponsesBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
}


def answer(
    body: LanguageBody,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    tokenizer: Any,
    **head: Any,
) -> dict[str, Any]:
    """The whole answer to any body. For the arguments see `completion_answer`."""
    if isinstance(body, CompletionBody):
        return completion_answer(body, prompts, completions, tokenizer, **head)
    [completion] = completions
    if isinstance(body, ChatBody):
        return chat_answer(body, completion, tokenizer, **head)
    return responses_answer(body, completion, tokenizer, **head)
