"""Several replicas on a local Ray cluster: one is killed under load, more come with the load, sessions stay put.

Ray is in the same environment as optkit, as a replica needs both: `pip install -c constraints.txt -e '.[ray]'`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ruamel.yaml import YAML

from tests.serving import Server, serving

_PATIENCE = 240.0
"""Seconds for what takes tens of them on an idle machine."""
KEY = "a-key-of-one-tenant"
TOKENS = 48


@pytest.fixture(autouse=True)
def installed() -> None:
    """A missing Ray is a failure: nobody asked for these tests without wanting to know."""
    if importlib.util.find_spec("ray") is None:
        pytest.fail("Ray is missing: .venv/bin/python -m pip install -c constraints.txt -e '.[ray]'", pytrace=False)


@contextmanager
def on_ray(directory: Path, artifact: Path, **options: Any) -> Iterator[Server]:
    """A server on a Ray cluster of its own."""
    environment = {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with serving(directory, artifact, keys=(KEY,), environment=environment, engine="ray", **options) as server:
        yield server


def replicas(server: Server) -> dict[int, list[int]]:
    """Processes of the replicas, and the worker processes of each."""
    found = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            if "ray::ServeReplica" in " ".join(process.cmdline()):
                found[process.pid] = [child.pid for child in process.children()]
        except psutil.NoSuchProcess:
            continue
    return found


def until(what: str, happened: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE
    while not happened():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.1)


class Load:
    """Greedy completions, half of them streamed, from several clients at once."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.expected: dict[str, str] = {}

    def body(self, number: int) -> dict[str, Any]:
        return {
            "model": "tiny",
            "prompt": f"Number {number % 5} jumps over the lazy dog.",
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }

    def learn(self) -> None:
        """What each prompt is answered."""
        for number in range(5):
            answer = self._server.post("/v1/completions", self.body(number)).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == TOKENS
            self.expected[self.body(number)["prompt"]] = answer["choices"][0]["text"]

    async def run(self, count: int, clients: int, while_under_way: Callable[[], None] = lambda: None) -> None:
        """Send `count` requests from `clients`; `while_under_way` is called once, when a quarter have their outcome."""
        numbers = iter(range(count))
        asked = False
        limits = httpx.Limits(max_connections=clients)
        url, headers = self._server.url, self._server.headers
        async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=_PATIENCE) as client:

            async def send() -> None:
                nonlocal asked
                for number in numbers:
                    outcome = await self.one(client, number)
                    self.outcomes[outcome] += 1
                    if not asked and self.outcomes.total() >= count // 4:
                        asked = True
                        while_under_way()

            await asyncio.gather(*(send() for _ in range(clients)))

    async def one(self, client: httpx.AsyncClient, number: int) -> str:
        body = self.body(number)
        try:
            if number % 2:
                return await self._streamed(client, body)
            response = await client.post("/v1/completions", json=body)
            if response.status_code != 200:
                return f"error {response.status_code}"
            choice = response.json()["choices"][0]
            return self._judged(body, choice["text"], choice["finish_reason"])
        except httpx.TransportError:
            return "broken"

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        text, reason, ended = "", None, False
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            if response.status_code != 200:
                return f"error {response.status_code}"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return "error event"
                    text += chunk["choices"][0]["text"]
                    reason = chunk["choices"][0]["finish_reason"] or reason
        if not ended:
            # A clean end of the body, and the client cannot know that something is missing.
            self.wrong.append(f"a stream ended without [DONE] after {text!r}")
        return self._judged(body, text, reason)

    def _judged(self, body: dict[str, Any], text: str, reason: str | None) -> str:
        if reason != "length" or text != self.expected[body["prompt"]]:
            self.wrong.append(f"{body['prompt']!r} was answered {text!r}, {reason}")
        return "whole"


@pytest.mark.timeout(900)
def test_a_replica_that_is_killed_under_load_costs_its_own_requests_an_error_and_is_replaced(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    with on_ray(tmp_path, tiny_artifact, replicas=2) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(server.url).status_code == 401
        load = Load(server)
        load.learn()
        before = replicas(server)
        assert len(before) == 2
        victim, workers = next(iter(before.items()))
        assert workers

        asyncio.run(load.run(300, 32, lambda: psutil.Process(victim).kill()))
        assert load.wrong == []
        assert load.outcomes.total() == 300
        # Some were on it; what comes later is sent to the other one.
        assert load.outcomes["whole"] < 300
        assert load.outcomes["whole"] >= 200
        assert set(load.outcomes) <= {"whole", "broken", "error event", "error 500", "error 503"}
        until("its worker processes end too", lambda: not any(map(psutil.pid_exists, workers)))

        until("another replica comes", lambda: len(replicas(server).keys() - {victim}) == 2)
        until("it is ready", lambda: all(replicas(server).values()) and server.get("/ready").status_code == 200)
        again = Load(server)
        again.expected = load.expected
        asyncio.run(again.run(60, 16))
        assert (again.wrong, again.outcomes) == ([], {"whole": 60})

        # An operator ends the server under load: what was accepted is answered, what comes then is refused.
        last = Load(server)
        last.expected = load.expected
        asyncio.run(last.run(120, 16, lambda: server.process.send_signal(signal.SIGTERM)))
        assert last.wrong == []
        assert last.outcomes["whole"] >= 30
        assert set(last.outcomes) <= {"whole", "error 503", "error 404", "broken"}
        assert server.process.wait(_PATIENCE) == 0
    assert not any(map(psutil.pid_exists, before))


@pytest.mark.timeout(900)
def test_replicas_come_with_the_load_and_sessions_stay_where_their_prefix_is(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    with on_ray(tmp_path, tiny_artifact, replicas="1:2", session_affinity=True) as server:
        assert len(replicas(server)) == 1
        load = Load(server)
        load.learn()
        end = time.monotonic() + _PATIENCE
        # More at once than seats and half as many: see `optkit.serve.scaling.replicas.target`.
        while len(replicas(server)) < 2:
            assert time.monotonic() < end, "no replica came with the load"
            asyncio.run(load.run(120, 30))
        assert (load.wrong, set(load.outcomes)) == ([], {"whole"})
        until("both are ready", lambda: all(replicas(server).values()) and server.get("/ready").status_code == 200)

        def ask(session: int) -> int:
            body = {"model": "tiny", "prompt": f"{session} " * 60, "max_tokens": 1}
            headers = server.headers | {"x-session-id": f"session-{session}"}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=_PATIENCE)
            return int(answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        sessions = range(100, 116)
        assert [ask(one) for one in sessions] == [0] * 16
        assert all(ask(one) > 0 for one in sessions)


@pytest.mark.timeout(600)
def test_the_example_for_a_cluster_is_what_rays_own_tool_takes(tiny_artifact: Path, tmp_path: Path) -> None:
    config = YAML(typ="safe").load(Path(__file__).parents[3] / "recipes/ray/serve.yaml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What belongs to the machine: the rest is as it stands there.
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    [application] = config["applications"]
    application["args"]["artifacts"] = [str(tiny_artifact)]
    application["deployments"][0]["ray_actor_options"]["num_cpus"] = 1
    # JSON is YAML, and Ray's parser, of YAML 1.1, reads no string in it as a number.
    (tmp_path / "serve.yaml").write_text(json.dumps(config))
    log = tmp_path / "log"
    variables = os.environ | {
        "OPTKIT_API_KEYS": KEY,
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [Path(sys.executable).parent / "serve", "run", tmp_path / "serve.yaml"]
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, env=variables) as process:
        try:
            server = Server(process, f"http://127.0.0.1:{port}", log, KEY)

            def ready() -> bool:
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    return server.get("/ready").status_code == 200
                except httpx.TransportError:
                    return False

            until("the application runs", ready)
            assert httpx.get(f"{server.url}/v1/models").status_code == 401
            load = Load(server)
            load.learn()
            asyncio.run(load.run(40, 8))
            assert (load.wrong, load.outcomes) == ([], {"whole": 40})
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(_PATIENCE)
