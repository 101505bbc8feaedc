"""litellm takes the server for OpenAI."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.serving import Server

_RUN = Path(__file__).parent / "run.py"
_KEY = "a-key-for-litellm"


def test_chats_tools_and_embeddings_arrive_through_litellm(
    serve: Callable[..., Server],
    client: Callable[..., str],
    smollm2_artifact: Path,
    tiny_artifact: Path,
    minilm_artifact: Path,
) -> None:
    server = serve(smollm2_artifact, tiny_artifact, minilm_artifact, keys=(_KEY,))
    # Without the variable it fetches a list of prices.
    found = json.loads(client("litellm", _RUN, server.url, _KEY, LITELLM_LOCAL_MODEL_COST_MAP="True"))
    assert "Paris" in found["whole"]
    assert {found[way] for way in ("streamed", "async", "async streamed")} == {found["whole"]}
    assert 0 < found["usage"] <= 16
    name, arguments = found["call"]
    assert name == "weather"
    assert arguments["city"] in ("Oslo", "Rome")
    cat, kitten, bill = found["vectors"]
    assert len(cat) == 384
    assert _cosine(cat, kitten) > _cosine(cat, bill) + 0.2
    assert found["errors"] == {"nobody": "NotFoundError", "stranger": "AuthenticationError"}
    server.settled()


def _cosine(one: list[float], other: list[float]) -> float:
    """Of vectors of length 1."""
    return sum(a * b for a, b in zip(one, other, strict=True))
