"""A server of a tiny language model and a tiny encoder, shared by the tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.scripted import install_scripted
from tests.serving import Server, folder_artifact, serving
from tests.serving import serve as serve

KEY, ADMIN = "a-key-of-one-tenant", "a-key-of-an-admin"


@pytest.fixture(scope="session")
def language(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the tiny Llama."""
    facts = {"tags": ["task:causal-lm"], "max_batch_size": 8, "max_length": 256}
    return folder_artifact(tmp_path_factory.mktemp("served"), "tiny", tiny_folder, **facts)


@pytest.fixture(scope="session")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the tiny BERT."""
    facts = {"tags": ["task:feature-extraction"], "max_batch_size": 8, "max_length": 64}
    return folder_artifact(tmp_path_factory.mktemp("served"), "encoder", tiny_encoder, **facts)


@pytest.fixture(scope="session")
def server(language: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Both of them, with keys, and files and batches."""
    directory = tmp_path_factory.mktemp("server")
    state = tmp_path_factory.mktemp("state") / "queue"
    with serving(directory, language, encoder, keys=(KEY,), admin_keys=(ADMIN,), state=state) as server:
        yield server


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., AbstractContextManager[Server]]:
    """`scripted_server(*artifacts, **options)`: a server of scripted artifacts, for fixtures that many tests share."""
    site = tmp_path_factory.mktemp("plugin") / "site"
    install_scripted(site)

    def start(*artifacts: Path | str, **options: Any) -> AbstractContextManager[Server]:
        environment = {"PYTHONPATH": str(site)}
        return serving(tmp_path_factory.mktemp("scripted"), *artifacts, environment=environment, **options)

    return start
