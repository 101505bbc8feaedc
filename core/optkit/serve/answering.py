"""Whole and streamed answers to the bodies that OpenAI's endpoints take. Endpoints and batches both end here."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError

from optkit.engine.openai import (
    BODIES,
    ChatBody,
    ChatStream,
    CompletionBody,
    CompletionStream,
    EmbeddingBody,
    LanguageBody,
    ResponsesBody,
    ResponsesStream,
    answer,
    embedding_answer,
    invalid,
)
from optkit.engine.outputs import Delta
from optkit.serve.errors import ApiError
from optkit.serve.guard.keys import Tenant
from optkit.serve.models import Encoder, Language, Models
from optkit.serve.observing.metrics import Metrics
from optkit.serve.observing.record import Record
from optkit.serve.sse import DONE, event
from optkit.serve.work import Asker, accounted, started

__all__ = ["Answering"]

EMBEDDINGS = "/v1/embeddings"


class Answering:
    """Answers bodies.

    Args:
        models: that are served.
        metrics: that count what happens.
        timeout: seconds that a batch line may take.
    """

    def __init__(self, models: Models, metrics: Metrics, timeout: float) -> None:
        self._models, self._metrics, self._timeout = models, metrics, timeout

    async def answer(
        self, url: str, body: Mapping[str, Any], *, tenant: Tenant, priority: int = 0, record: Record | None = None
    ) -> dict[str, Any]:
        """The whole answer to a body that nobody has checked, for a line of a batch.

        Raises:
            ApiError: the request is wrong, or it failed.
            Refused: there is no room now, or the model is not ready.
        """
        kind = EmbeddingBody if url == EMBEDDINGS else BODIES.get(url)
        if kind is None:
            raise ApiError(404, "there is no endpoint of that name", code="unknown_url")
        try:
            checked = kind.model_validate(body)
        except ValidationError as error:
            said = invalid(error)["error"]
            raise ApiError(400, said["message"], param=said["param"]) from error
        asker = Asker(tenant, record or Record("", path=url), self._timeout, priority)
        if isinstance(checked, EmbeddingBody):
            return await self.embedded(checked, asker)
        return await self.whole(checked, asker)

    async def whole(self, body: LanguageBody, asker: Asker) -> dict[str, Any]:
        """The answer to a body for a language model, once all of it is there. Raises as `answer`."""
        model = self._models.language(body.model)
        head = _head(model, body)
        async with started(model, body, asker, self._metrics) as work:
            completions = await work.completions()
        return answer(body, work.prompts, completions, model.tokenizer, **head)

    async def streamed(self, body: LanguageBody, asker: Asker) -> AsyncGenerator[bytes, None]:
        """The same as events, as they come. The first one, possibly empty, means that the engine has the request.

        What fails after that is the last event, as every client must learn that the answer is not whole.

        Raises:
            ApiError: as `answer`, before the first event.
        """
        model = self._models.language(body.model)
        asker.record.stream = True
        accepted = False
        try:
            async with started(model, body, asker, self._metrics) as work:
                stream, add = _stream(body, _head(model, body), model, work.prompts)
                yield _events(stream.start())
                accepted = True
                async with aclosing(work.deltas()) as deltas:
                    async for prompt, delta in deltas:
                        if chunks := add(prompt, delta):
                            yield _events(chunks)
                yield _events(stream.end()) + (b"" if isinstance(stream, ResponsesStream) else DONE)
        except ApiError as error:
            if not accepted:
                raise
            asker.record.error = asker.record.error or error.message
            yield event(error.body(), "error" if isinstance(body, ResponsesBody) else "")

    async def embedded(self, body: EmbeddingBody, asker: Asker) -> dict[str, Any]:
        """The answer to a body for an encoder. Raises as `answer`."""
        model, record = self._models.encoder(body.model), asker.record
        with accounted(model.name, record, self._metrics):
            sequences = await asyncio.to_thread(_sequences, body, model)
            record.prompt_tokens = sum(map(len, sequences))
            with model.gate.passing(math.ceil(len(sequences) / model.gate.seats)):
                vectors = await model.engine.embed(sequences, timeout=asker.timeout)
            return embedding_answer(body, vectors, record.prompt_tokens, {"model": model.name})


def _head(model: Language, body: LanguageBody) -> dict[str, Any]:
    return {
        "id": body.prefix + secrets.token_hex(12),
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }


def _sequences(body: EmbeddingBody, model: Encoder) -> list[tuple[int, ...]]:
    """Token ids of each input."""
    inputs = body.prompts()
    texts = iter(model.text.tokenize([one for one in inputs if isinstance(one, str)], cut=False))
    return [next(texts) if isinstance(one, str) else tuple(one) for one in inputs]


Chunks = Sequence[dict[str, Any]] | Sequence[tuple[str, dict[str, Any]]]


def _stream(
    body: LanguageBody, head: dict[str, Any], model: Language, prompts: Sequence[tuple[int, ...]]
) -> tuple[ChatStream | CompletionStream | ResponsesStream, Callable[[int, Delta], Chunks]]:
    """What makes the chunks of an answer, and what takes a delta of one of its prompts."""
    if isinstance(body, CompletionBody):
        several = CompletionStream(body, head, model.tokenizer, prompts)
        return several, several.add
    if isinstance(body, ChatBody):
        chat = ChatStream(body, head, model.tokenizer, len(prompts[0]))
        return chat, lambda _, delta: chat.add(delta)
    response = ResponsesStream(body, head, model.tokenizer, len(prompts[0]))
    return response, lambda _, delta: response.add(delta)


def _events(chunks: Chunks) -> bytes:
    """Those of Responses have names, which are in them as well."""
    return b"".join(event(one[1], one[0]) if isinstance(one, tuple) else event(one) for one in chunks)
