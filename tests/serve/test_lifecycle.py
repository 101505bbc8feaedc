"""Too much to do, clients that leave, processes that die, and the server's end: what becomes of requests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from optkit.errors import MachineError

LONG = {"prompt": "fox", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
SLOW = 0.02
"""Seconds of a step: 100 tokens take two."""


@pytest.fixture(scope="module")
def slow(scripted_server, scripted_artifact):
    """One request at a time, and one that waits."""
    with scripted_server(scripted_artifact(SLOW, batch=1), max_queue=1) as server:
        yield server


def events(answer: httpx.Response):
    """The data of each event of a stream."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


@contextmanager
def stream(server, body=LONG, **options):
    with (
        httpx.Client(timeout=60, **options) as client,
        client.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as answer,
    ):
        yield answer


def log_lines(server):
    return [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]


def request_lines(server):
    return [one for one in log_lines(server) if one.get("event") == "request"]


def next_lines(server, known, count):
    """Lines after the first `known`, once there are `count`: a client who left has one when the server notices."""
    end = time.monotonic() + 10
    while len(lines := request_lines(server)[known:]) < count:
        assert time.monotonic() < end, f"no line of {count} requests, only {lines}"
        time.sleep(0.05)
    return lines


def test_an_answer_and_a_stream_say_the_same(slow):
    whole = slow.post("/v1/completions", LONG).json()
    with stream(slow) as answer:
        *chunks, done = events(answer)
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [choice["finish_reason"] for choice in choices][-1] == "length" == whole["choices"][0]["finish_reason"]
    assert whole["usage"]["completion_tokens"] == 100


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_frees_its_blocks(slow, streamed):
    before, known = slow.metric("generation_tokens_total"), len(request_lines(slow))
    if streamed:
        with stream(slow) as answer:
            received = events(answer)  # kept: an iterator that is dropped closes its connection
            next(received)
            assert slow.metric("num_requests_running") == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{slow.url}/v1/completions", json=LONG, timeout=0.5)
    slow.settled()
    assert slow.metric("generation_tokens_total") - before < 100
    assert slow.post("/v1/completions", {**LONG, "max_tokens": 1}).status_code == 200
    assert sorted(line["status"] for line in next_lines(slow, known, 2)) == [200, 499]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(slow):
    before = slow.metric("requests_rejected_total", reason="queue_full")
    with stream(slow) as first, stream(slow) as second:
        received = events(first)
        next(received)
        refused = slow.post("/v1/completions", LONG)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert second.status_code == 200
        assert slow.post("/v1/completions", {**LONG, "prompt": ["a", "b", "c"]}).status_code == 400
    assert slow.metric("requests_rejected_total", reason="queue_full") == before + 1
    slow.settled()


def test_a_request_that_takes_too_long_ends(slow):
    soon = {"x-request-timeout": "0.1"}
    late = httpx.post(f"{slow.url}/v1/completions", json=LONG, headers=soon)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    with stream(slow, headers=soon) as answer:
        *_, last = events(answer)
    assert json.loads(last)["error"]["code"] == "timeout"
    for wrong in ("soon", "0", "-1", "nan"):
        headers = {"x-request-timeout": wrong}
        assert httpx.post(f"{slow.url}/v1/completions", json=LONG, headers=headers).status_code == 400
    slow.settled()


def test_a_worker_that_is_killed_ends_its_requests_with_an_error_and_is_replaced(slow):
    with ThreadPoolExecutor() as pool, stream(slow) as answer:
        received = events(answer)
        assert "text" in json.loads(next(received))["choices"][0]
        waiting = pool.submit(slow.post, "/v1/completions", LONG)
        while not slow.metric("num_requests_waiting"):
            pass
        [worker] = subprocess.check_output(["pgrep", "-P", str(slow.process.pid)], text=True).split()
        os.kill(int(worker), signal.SIGKILL)
        *chunks, last = received
        died = waiting.result()
    assert all(json.loads(chunk)["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert json.loads(last)["error"]["code"] == "worker_died"
    assert (died.status_code, died.json()["error"]["code"]) == (503, "worker_died")
    assert slow.post("/v1/completions", {**LONG, "max_tokens": 1}).status_code == 200
    assert slow.get("/health").json()["models"]["scripted"]["restarts"] == 1
    slow.settled()


def test_a_step_that_hangs_shows_in_health_and_not_in_the_web_server(serve, scripted):
    server = serve(scripted())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**LONG, "prompt": [311]}, timeout=0.5)
    assert server.get("/v2/health/live").json() == {"live": True}
    [model] = server.get("/health").json()["models"].values()
    assert model["silent_seconds"] > 0.4
    server.process.kill()
    server.process.wait()


def test_what_the_model_cannot_compute_is_an_error_without_its_inside(slow):
    failed = slow.post("/v1/completions", {**LONG, "prompt": [312]})
    assert failed.status_code == 500
    assert "request's id" in failed.json()["error"]["message"]
    line = request_lines(slow)[-1]
    assert "this token cannot be computed" in line["error"]
    assert line["request_id"] == failed.headers["x-request-id"]


def test_sigterm_answers_what_is_open_and_refuses_the_rest(serve, scripted):
    server = serve(scripted(SLOW))
    with ThreadPoolExecutor() as pool, stream(server) as answer, httpx.Client() as kept:
        received = events(answer)
        next(received)
        whole = [pool.submit(server.post, "/v1/completions", LONG) for _ in range(6)]
        while server.metric("num_requests_running") + server.metric("num_requests_waiting") < 7:
            pass
        assert kept.get(f"{server.url}/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        while (ready := kept.get(f"{server.url}/ready")).status_code == 200:
            pass
        assert ready.json()["status"] == "draining"
        refused = server.post("/v1/completions", LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        *_, last, done = received
        # Those that waited too: they were accepted.
        assert [one.result().json()["usage"]["completion_tokens"] for one in whole] == [100] * 6
    assert json.loads(last)["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("how", ["a second signal", "the end of its patience"])
def test_what_is_broken_off_ends_with_an_error(serve, scripted, how):
    options = {"drain_timeout": 0.2} if how == "the end of its patience" else {}
    server = serve(scripted(0.2), **options)
    with stream(server) as answer:
        received = events(answer)
        next(received)
        server.process.send_signal(signal.SIGTERM)
        if not options:
            while server.get("/ready").status_code == 200:
                pass
            server.process.send_signal(signal.SIGTERM)
        left = []
        try:
            left = list(received)
        except httpx.RemoteProtocolError:
            assert not options
    assert "[DONE]" not in left
    if options:
        assert json.loads(left[-1])["error"]["code"] == "unavailable"
    assert server.process.wait(30) == 0


def test_readers_that_do_not_read_block_nobody(server):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "n": 8, "logprobs": 20, "model": "tiny", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}:{port}\r\nauthorization: Bearer {server.key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    readers = []
    for _ in range(8):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        reader.connect((host, int(port)))
        reader.sendall(head.encode() + body)
        readers.append(reader)
    assert server.post("/v1/completions", LONG).json()["usage"]["completion_tokens"] == 100
    server.settled()
    for reader in readers:
        reader.close()


def test_an_address_in_use_is_known_before_anything_is_loaded(scripted):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "optkit.cli", "serve", str(scripted()), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == MachineError.exit_code
    assert "the address cannot be bound" in done.stderr
    assert "is ready" not in done.stderr


def test_many_at_once_each_get_one_answer(slow):
    before = slow.metric("request_success_total", finished_reason="length")

    def one(place):
        return slow.post("/v1/completions", {**LONG, "max_tokens": 5, "prompt": [6 + place % 200]}).status_code

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(one, range(80)))
    assert set(outcomes) == {200, 429}
    slow.settled()
    assert slow.metric("request_success_total", finished_reason="length") - before == outcomes.count(200)
