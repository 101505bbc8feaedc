"""`optkit serve` as a process of its own, for the tests of the server and of its clients."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import httpx
    from prometheus_client.samples import Sample

TOOL_TEMPLATE = (
    '{% if tools %}<|system|>Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>'
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template for tools, which are called as models of the Hermes family call them."""
_PATIENCE = 60.0
"""Seconds for what takes milliseconds on an idle machine."""


class Server:
    """A server that runs, made by `serving`.

    Args:
        process: of `optkit serve`.
        url: without a path.
        log: JSON lines of its standard error.
        key: of an admin; empty where there are no keys.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path, key: str) -> None:
        self.process, self.url, self.log, self.key = process, url, log, key

    @property
    def headers(self) -> dict[str, str]:
        """That let a request in."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def get(self, path: str) -> httpx.Response:
        """The answer to a GET."""
        import httpx

        return httpx.get(self.url + path, headers=self.headers, timeout=_PATIENCE)

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """The answer to a POST of JSON."""
        import httpx

        return httpx.post(self.url + path, json=body, headers=self.headers, timeout=_PATIENCE)

    def metrics(self) -> list[Sample]:
        """What `/metrics` says now."""
        from prometheus_client.parser import text_string_to_metric_families

        answer = self.get("/metrics").raise_for_status()
        return [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; `name` goes without `optkit:`."""
        wanted = labels.items()
        return sum(one.value for one in self.metrics() if one.name == f"optkit:{name}" and wanted <= one.labels.items())

    def settled(self) -> None:
        """Return once nothing runs or waits and all blocks of the KV cache are free."""
        names = {f"optkit:{name}" for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
        end = time.monotonic() + _PATIENCE
        while busy := {one.name: one.value for one in self.metrics() if one.name in names and one.value}:
            assert time.monotonic() < end, f"the server does not come to rest: {busy}"
            time.sleep(0.01)

    def stop(self) -> int:
        """End it as an operator does; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_PATIENCE)


@contextmanager
def serving(
    directory: Path,
    *artifacts: Path | str,
    keys: tuple[str, ...] = (),
    admin_keys: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    **options: object,
) -> Iterator[Server]:
    """A server of `artifacts` on a free port, for as long as the context lasts; it must end with exit code 0.

    Args:
        directory: an empty one, for its log and its caches.
        artifacts: `PATH` or `NAME=PATH`.
        keys: API keys.
        admin_keys: those that may load and unload models.
        environment: more variables.
        options: of the command line, for example `max_queue=4`; True is a flag.
    """
    command = [sys.executable, "-m", "optkit.cli", "serve", *map(str, artifacts), "--port", "0"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        command += [option] if value is True else [option, str(value)]
    variables = {**os.environ, "OPTKIT_CACHE": str(directory / "cache")}
    for variable, given in (("OPTKIT_API_KEYS", keys), ("OPTKIT_ADMIN_KEYS", admin_keys)):
        variables.pop(variable, None)
        if given:
            variables[variable] = ",".join(given)
    log = directory / "log.jsonl"
    with log.open("w") as stream, ExitStack() as stack:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stream, text=True, env=variables | dict(environment or {})
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), f"the server did not start:\n{line}{log.read_text()[-4000:]}"
        server = Server(process, line.split()[-1], log, next(iter((*admin_keys, *keys)), ""))
        assert server.get("/ready").status_code == 200
        yield server
        if process.poll() is None:
            assert server.stop() == 0, f"the server did not end well:\n{log.read_text()[-4000:]}"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(*artifacts, **options)` starts a server, with arguments as `serving` has them; the test's end ends it."""
    with ExitStack() as stack:
        started = iter(range(1000))

        def start(*artifacts: Path | str, **options: Any) -> Server:
            directory = tmp_path / f"server-{next(started)}"
            directory.mkdir()
            return stack.enter_context(serving(directory, *artifacts, **options))

        yield start


def folder_artifact(directory: Path, name: str, folder: Path, **facts: Any) -> Path:
    """A Hugging Face folder as an artifact below `directory` that torch runs.

    Args:
        directory: where; its files are copied, as an artifact holds them itself.
        name: of the artifact.
        folder: of the model.
        facts: for the manifest; `max_batch_size`, `max_length` and `tags` at least.
    """
    from optkit.artifact import publish, staging

    strategy = "dynamic" if "task:feature-extraction" in facts["tags"] else "continuous"
    recipe = {"backend": {"torch": {}}, "batching": {strategy: {"max_batch_size": facts["max_batch_size"]}}}
    whole = {"name": name, "recipe": recipe, "recipe_hash": "", "steps": [], "servable_by": [], "machine": {}}
    with staging(directory / name) as staged:
        (staged / "runtime").mkdir()
        shutil.copytree(folder, staged / "weights")
        return publish(staged, directory / name, whole | facts).path
