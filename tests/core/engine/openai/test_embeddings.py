"""Embeddings as OpenAI's client reads them."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse

from optkit.engine.openai import EmbeddingBody, embedding_answer
from optkit.errors import RequestError

from .conftest import exactly

VECTORS = np.array([[3.0, 4.0, 12.0], [0.1, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_each_input_is_a_prompt(given, prompts):
    assert EmbeddingBody.model_validate({"input": given, "model": "m", "user": "me"}).prompts() == prompts


@pytest.mark.parametrize("form", [None, "float", "base64"])
@pytest.mark.parametrize("dimensions", [None, 2, 3])
def test_vectors_come_back(form, dimensions):
    body = EmbeddingBody.model_validate({"input": ["a"] * 3, "encoding_format": form, "dimensions": dimensions})
    answer = embedding_answer(body, VECTORS, 7, {"model": "m"})
    if form == "base64":
        for one in answer["data"]:
            one["embedding"] = np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4").tolist()
    known = exactly(CreateEmbeddingResponse, answer)
    assert (known.model, known.usage.prompt_tokens, known.usage.total_tokens) == ("m", 7, 7)
    assert [one.index for one in known.data] == [0, 1, 2]
    found = np.array([one.embedding for one in known.data], dtype=np.float32)
    if dimensions is None:
        assert (found == VECTORS).all()
        return
    assert found.shape == (3, dimensions)
    expected = VECTORS[:, :dimensions].astype(np.float64)
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    expected = np.divide(expected, lengths, out=np.zeros_like(expected), where=lengths > 0)
    assert np.allclose(found, expected, atol=1e-6)


def test_more_dimensions_than_the_model_has_are_refused():
    body = EmbeddingBody.model_validate({"input": "a", "dimensions": 4})
    with pytest.raises(RequestError, match=r"^dimensions: the model has 3, found 4$"):
        embedding_answer(body, VECTORS[:1], 1, {"model": "m"})
