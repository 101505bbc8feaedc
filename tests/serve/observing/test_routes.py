"""Operators get an answer from a server in any state."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from optkit.engine.async_engine import Health
from optkit.engine.client import WorkerEngine
from optkit.engine.one_step import TensorStats
from optkit.engine.request import SamplingParams
from optkit.engine.stats import Stats
from optkit.errors import MachineError
from optkit.serve.observing import routes
from optkit.serve.observing.metrics import Metrics

READY = Health("ready", 0.0, False, 0)


@dataclass
class Engine:
    """Says of itself what a test set."""

    now: Health = READY
    counted: Any = field(default_factory=Stats)
    pid: int | None = None
    stuck: bool = False

    async def health(self) -> Health:
        if self.stuck:
            await asyncio.Event().wait()
        return self.now

    async def stats(self) -> Any:
        if isinstance(self.counted, Exception):
            raise self.counted
        counted, self.counted = self.counted, getattr(self.counted, "then", self.counted)
        return counted() if callable(counted) else counted


def serving(draining: bool = False, **engines: Any) -> SimpleNamespace:
    models = [SimpleNamespace(name=name, engine=engine) for name, engine in engines.items()]
    return SimpleNamespace(models=SimpleNamespace(loaded=lambda: iter(models)), draining=draining, metrics=Metrics())


def client(server: Any) -> httpx.AsyncClient:
    app = FastAPI()
    app.state.serving = server
    app.include_router(routes.router)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def ask(server: Any, url: str, method: str = "GET") -> httpx.Response:
    async def main():
        async with client(server) as asking:
            return await asking.request(method, url)

    return asyncio.run(main())


def test_a_server_whose_models_all_answer_is_healthy_and_ready():
    server = serving(one=Engine(), two=Engine(Health("ready", 1.23456, False, 3, "/secret/path")))
    answer = ask(server, "/health")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "models": {
            "one": {"state": "ready", "silent_seconds": 0.0, "hung": False, "restarts": 0},
            "two": {"state": "ready", "silent_seconds": 1.235, "hung": False, "restarts": 3},
        },
    }
    assert ask(server, "/ready").status_code == 200


@pytest.mark.parametrize(
    "bad",
    [
        Health("starting", 0.0, False, 1, "/secret/path"),
        Health("failed", 0.0, False, 5, "/secret/path"),
        Health("ready", 90.0, True, 0),
        Health("closed", 0.0, False, 0),
    ],
)
def test_one_model_that_does_not_serve_is_enough_to_be_neither(bad):
    server = serving(one=Engine(), two=Engine(bad))
    answer = ask(server, "/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "failing")
    assert "secret" not in answer.text
    answer = ask(server, "/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert f'optkit:worker_up{{model_name="two"}} {0.0}' in ask(server, "/metrics").text


def test_a_server_that_is_about_to_end_is_healthy_and_not_ready():
    server = serving(draining=True, one=Engine())
    assert ask(server, "/health").status_code == 200
    answer = ask(server, "/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "draining"})


def test_a_server_without_models_is_healthy_and_not_ready():
    assert ask(serving(), "/health").json() == {"status": "ok", "models": {}}
    assert ask(serving(), "/ready").status_code == 503
    assert ask(serving(), "/metrics").status_code == 200


def test_an_engine_that_never_answers_is_hung_and_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(routes, "_PATIENCE", 0.05)
    server = serving(one=Engine(), two=Engine(stuck=True), three=Engine(stuck=True))
    answer = ask(server, "/health")
    assert answer.status_code == 503
    assert {name: one["hung"] for name, one in answer.json()["models"].items()} == {
        "one": False,
        "two": True,
        "three": True,
    }
    assert ask(server, "/metrics").status_code == 200


@pytest.mark.parametrize("url", ["/health", "/ready", "/metrics", "/version"])
def test_head_is_answered_as_get(url):
    answer = ask(serving(one=Engine()), url, "HEAD")
    assert answer.status_code == 200


def test_the_schema_of_the_endpoints_can_be_made():
    app = FastAPI()
    app.include_router(routes.router)
    assert {"/health", "/ready", "/metrics", "/version"} <= set(app.openapi()["paths"])


def test_the_version_is_told():
    import optkit

    assert ask(serving(), "/version").json() == {"version": optkit.__version__}


def test_metrics_are_of_every_kind_of_engine_and_of_the_processes(samples):
    server = serving(
        language=Engine(counted=Stats(output_tokens=7, running=2), pid=os.getpid()),
        encoder=Engine(counted=TensorStats(tokens=9, padding=2), pid=os.getpid()),
        dying=Engine(counted=MachineError("it died")),
    )
    answer = ask(server, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(server.metrics)
    assert found["optkit:generation_tokens_total", "language"] == 7
    assert found["optkit:num_requests_running", "language"] == 2
    assert found["optkit:prompt_tokens_total", "encoder"] == 9
    assert found["optkit:worker_resident_memory_bytes", "encoder"] > 0
    assert found["optkit:worker_up", "dying"] == 1
    assert ("optkit:generation_tokens_total", "dying") not in found


def test_an_answer_of_a_process_that_was_replaced_meanwhile_counts_for_nobody(samples):
    engine = Engine(pid=10)

    def replaced() -> Stats:
        engine.pid, engine.counted = 11, Stats(output_tokens=2)
        return Stats(output_tokens=100)

    engine.counted = replaced
    server = serving(one=engine)
    ask(server, "/metrics")
    assert ("optkit:generation_tokens_total", "one") not in samples(server.metrics)
    ask(server, "/metrics")
    assert samples(server.metrics)["optkit:generation_tokens_total", "one"] == 2


def test_a_real_worker_is_followed_over_its_death_by_many_scrapes_at_once(samples, scripted):
    params = SamplingParams(max_tokens=20)

    async def main():
        async with WorkerEngine(scripted()) as engine:
            server = serving(one=engine)
            async with client(server) as asking:
                assert (await asking.get("/ready")).status_code == 200
                await engine.generate((7, 8, 9), params)
                await asyncio.gather(*(asking.get("/metrics") for _ in range(8)))
                before = samples(server.metrics)
                assert before["optkit:generation_tokens_total", "one"] == 20
                assert before["optkit:prompt_tokens_total", "one"] == 3
                assert before["optkit:worker_up", "one"] == 1
                assert before["optkit:worker_resident_memory_bytes", "one"] > 1e6
                os.kill(engine.pid, signal.SIGKILL)
                completion = await engine.generate((7, 8, 9), params)  # ends with an error, or waits for the next
                if completion.error:
                    completion = await engine.generate((7, 8, 9), params)
                assert len(completion.samples[0].tokens) == 20
                await asyncio.gather(*(asking.get("/metrics") for _ in range(8)))
                answer = await asking.get("/health")
                assert (answer.status_code, answer.json()["models"]["one"]["restarts"]) == (200, 1)
                after = samples(server.metrics)
                assert after["optkit:generation_tokens_total", "one"] == 40
                assert after["optkit:prompt_tokens_total", "one"] == 6
                assert after["optkit:worker_restarts_total", "one"] == 1

    asyncio.run(main())
