"""What the tests ask for, with as little of it as they need."""

from __future__ import annotations

from typing import Any, Literal

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

from tests.serving import Server

KEY = "a-key-for-the-openai-client"
HELLO = [{"role": "user", "content": "What is the capital of France?"}]
LONG = {"ignore_eos": True, "min_tokens": 400}


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    country: Literal["France", "Spain"]
    capital: bool


def asynchronous(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def chat(client: OpenAI, **fields: Any) -> Any:
    whole = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, "seed": 1}
    return client.chat.completions.create(**whole | fields)


def completion(client: OpenAI, **fields: Any) -> Any:
    return client.completions.create(
        **{"model": "tiny", "prompt": "The quick brown", "max_tokens": 8, "temperature": 0} | fields
    )
