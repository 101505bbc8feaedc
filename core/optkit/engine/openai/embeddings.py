"""Embeddings: https://platform.openai.com/docs/api-reference/embeddings"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from optkit.engine.openai.fields import MAX_PROMPTS, Label, Strict, Text, Tokens
from optkit.errors import RequestError

__all__ = ["EmbeddingBody", "embedding_answer"]


class EmbeddingBody(Strict):
    """Of `/v1/embeddings`. `user` says nothing about the output."""

    input: (
        Text
        | Tokens
        | Annotated[list[Text], Field(max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS)]
    ) = Field(union_mode="left_to_right")
    model: Label | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, lt=1 << 20)
    """Keep so many and normalize again: of use with models that were trained for it (Matryoshka, arXiv:2205.13147)."""
    user: Label | None = None

    @model_validator(mode="after")
    def _some_input(self) -> EmbeddingBody:
        if not self.input or (isinstance(self.input, list) and ([] in self.input or "" in self.input)):
            raise ValueError("an input is empty")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Each is embedded by itself: text, or token ids."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


def embedding_answer(
    body: EmbeddingBody, vectors: npt.NDArray[np.floating[Any]], tokens: int, head: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer to a request for embeddings.

    Args:
        body: what was asked.
        vectors: of its inputs, `[inputs, dimensions]`.
        tokens: of all inputs together.
        head: `model`, and what else stands at the top.

    Raises:
        RequestError: the model has fewer dimensions than asked for.
    """
    found = np.asarray(vectors, dtype="<f4")
    if body.dimensions is not None:
        if body.dimensions > found.shape[1]:
            raise RequestError(f"dimensions: the model has {found.shape[1]}", found=body.dimensions)
        found = found[:, : body.dimensions]
        found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo("<f4").tiny)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(found)
    ]
    return {"object": "list", "data": data, **head, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _written(vector: npt.NDArray[Any], form: str | None) -> str | list[float]:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    values: list[float] = vector.tolist()
    return values
