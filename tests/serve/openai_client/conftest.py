"""OpenAI's own Python client, and a server of its own for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.serve.openai_client.asking import KEY
from tests.serving import TOOL_TEMPLATE, Server, folder_artifact, serving


@pytest.fixture(scope="session")
def server(
    tiny_llama: Callable[..., Any], tiny_bert: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A language model `tiny`, whose chat template takes tools, and an encoder `encoder`."""
    from optkit.weights import save_folder

    directory = tmp_path_factory.mktemp("openai-client")
    artifacts = []
    for name, one, length in (("tiny", tiny_llama(max_position_embeddings=1024), 1024), ("encoder", tiny_bert(), 64)):
        folder = directory / f"{name}-folder"
        save_folder(one, folder)
        if name == "tiny":
            (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
        facts = {"max_batch_size": 8, "max_length": length, "tags": sorted(one.tags)}
        artifacts.append(folder_artifact(directory, name, folder, **facts))
    # No queue, so that one request of eight prompts fills the model.
    with serving(directory, *artifacts, keys=(KEY,), state=directory / "state", max_queue=0) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client
    server.settled()
