"""Endpoints of causal language models.

https://platform.openai.com/docs/api-reference; `/tokenize` and `/detokenize` as vLLM has them.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field, model_validator

from optkit.engine.openai import ChatBody, CompletionBody, LanguageBody, ResponsesBody
from optkit.engine.openai.chat import ChatMessage
from optkit.engine.openai.fields import Strict
from optkit.engine.text import Chat, Prompt, encode
from optkit.errors import RequestError
from optkit.serve.errors import ApiError, of_request
from optkit.serve.routes.asking import asker_of, serving_of, streamed, whole
from optkit.serve.sse import json_reply

__all__ = ["router"]

router = APIRouter()

_MOST_TEXT = 4 << 20


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request) -> Response:
    """The next turn of a chat."""
    return await _answered(body, request)


@router.post("/v1/completions")
async def complete(body: CompletionBody, request: Request) -> Response:
    """The continuation of one or several prompts."""
    return await _answered(body, request)


@router.post("/v1/responses")
async def respond(body: ResponsesBody, request: Request) -> Response:
    """The answer to an input of text. Nothing is stored."""
    return await _answered(body, request)


async def _answered(body: LanguageBody, request: Request) -> Response:
    answering, asker = serving_of(request).answering, asker_of(request)
    if body.stream:
        return await streamed(request, answering.streamed(body, asker))
    return await whole(request, answering.whole(body, asker))


class TokenizeBody(Strict):
    """Of `/tokenize`: a text, or the messages of a chat."""

    model: str | None = Field(default=None, max_length=256)
    prompt: str | None = Field(default=None, max_length=_MOST_TEXT)
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=4096)
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Strict):
    """Of `/detokenize`."""

    model: str | None = Field(default=None, max_length=256)
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]] = Field(max_length=1 << 20)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Token ids of a text, as the model gets them."""
    model = serving_of(request).models.language(body.model)
    wish: Prompt = body.prompt or ""
    if body.messages is not None:
        wish = Chat([one.plain() for one in body.messages], add_generation_prompt=body.add_generation_prompt)
    try:
        ids = await asyncio.to_thread(encode, model.tokenizer, wish)
    except RequestError as error:
        raise of_request(error) from error
    return json_reply({"count": len(ids), "max_model_len": model.max_length, "tokens": ids})


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """The text of token ids."""
    model = serving_of(request).models.language(body.model)
    if body.tokens and max(body.tokens) >= len(model.tokenizer):
        raise ApiError(400, f"tokens: there are ids outside 0 to {len(model.tokenizer) - 1}", param="tokens")
    return json_reply({"prompt": await asyncio.to_thread(model.tokenizer.decode, body.tokens)})
