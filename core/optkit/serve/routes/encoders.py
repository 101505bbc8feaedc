"""The endpoint of text encoders: https://platform.openai.com/docs/api-reference/embeddings"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from optkit.engine.openai import EmbeddingBody
from optkit.serve.routes.asking import asker_of, serving_of, whole

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/embeddings")
async def embed(body: EmbeddingBody, request: Request) -> Response:
    """One vector for each input."""
    return await whole(request, serving_of(request).answering.embedded(body, asker_of(request)))
