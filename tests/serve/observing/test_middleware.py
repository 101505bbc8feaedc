"""Every request has an id, one line, and an answer; what clients make up stays out of labels and lines."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from optkit.serve.errors import internal
from optkit.serve.observing.metrics import Metrics
from optkit.serve.observing.middleware import Observed
from optkit.serve.observing.record import Aborted, Record

SECRET = "sk-a-key"


def application() -> FastAPI:
    files = APIRouter(prefix="/files")

    @files.get("/{file_id}")
    async def file(file_id: str) -> dict[str, str]:
        return {"id": file_id}

    v1 = APIRouter(prefix="/v1")
    v1.include_router(files)
    app = FastAPI()
    app.include_router(v1)

    @app.post("/filled")
    async def filled(request: Request) -> dict[str, str]:
        record: Record = request.scope["state"]["record"]
        record.model, record.tenant, record.stream = "m", "acme", True
        record.prompt_tokens, record.cached_tokens, record.output_tokens = 10, 4, 3
        record.finish_reasons.append("stop")
        record.first_token = record.started + 0.25
        return {"id": record.request_id}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    return app


async def failing(scope, receive, send):
    raise ValueError("what a client must not see")


async def silent(scope, receive, send):
    pass


async def breaking(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"another")]})
    await send({"type": "http.response.body", "body": b"part", "more_body": True})
    raise ValueError("in the middle")


def ask(app, *requests: tuple[str, str], headers: dict[str, str] | None = None) -> list[httpx.Response]:
    async def main():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            return [await client.request(method, url) for method, url in requests]

    return asyncio.run(main())


def lines(logged):
    return [line for line in logged() if line["event"] == "request"]


def test_a_request_is_logged_by_its_route_and_never_by_what_the_client_wrote(samples, logged):
    metrics = Metrics()
    requests = [
        ("GET", "/v1/files/private-name?token=sk-a-key"),
        ("POST", "/v1/files/private-name"),
        ("GET", "/private-name"),
    ]
    answers = ask(Observed(application(), metrics), *requests, headers={"authorization": f"Bearer {SECRET}"})
    assert [answer.status_code for answer in answers] == [200, 405, 404]
    found = lines(logged)
    assert [line["path"] for line in found] == ["/v1/files/{file_id}", "/v1/files/{file_id}", "unknown"]
    assert [line["request_id"] for line in found] == [answer.headers["x-request-id"] for answer in answers]
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", line["request_id"]) for line in found)
    assert "private-name" not in json.dumps(logged())
    assert SECRET not in json.dumps(logged())
    counted = samples(metrics)
    assert counted["optkit:http_requests_total", "/v1/files/{file_id}", "GET", "200"] == 1
    assert counted["optkit:http_requests_total", "/v1/files/{file_id}", "POST", "405"] == 1
    assert counted["optkit:http_requests_total", "unknown", "GET", "404"] == 1


def test_a_line_has_what_the_route_noted(logged):
    [answer] = ask(Observed(application(), Metrics()), ("POST", "/filled"), headers={"x-client-request-id": "mine"})
    [line] = lines(logged)
    assert line.pop("seconds") >= 0
    del line["time"]
    assert line == {
        "level": "info",
        "logger": "optkit.serve.observing.middleware",
        "event": "request",
        "request_id": answer.json()["id"],
        "client_request_id": "mine",
        "method": "POST",
        "path": "/filled",
        "status": 200,
        "model": "m",
        "tenant": "acme",
        "stream": True,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "output_tokens": 3,
        "finish_reasons": ["stop"],
        "ttft": 0.25,
        "error": "",
    }


@pytest.mark.parametrize(
    ("given", "kept"),
    [("a" * 512, "a" * 512), ("a" * 513, ""), ("caf\xe9", ""), ("a\x1b[2Jb", ""), ('"},{', '"},{')],
)
def test_a_clients_own_id_is_kept_when_it_is_short_and_plain(logged, given, kept):
    headers = {"x-client-request-id": given.encode("latin-1")}
    [answer] = ask(Observed(application(), Metrics()), ("GET", "/v1/files/1"), headers=headers)
    assert answer.status_code == 200
    assert given not in answer.headers.values()
    assert lines(logged)[0]["client_request_id"] == kept


@pytest.mark.parametrize("app", [failing, silent])
def test_whatever_nobody_handled_is_an_answer_that_says_nothing_of_the_inside(samples, logged, app):
    metrics = Metrics()
    [answer] = ask(Observed(app, metrics), ("GET", "/"))
    assert (answer.status_code, answer.json()) == (500, internal().body())
    assert answer.headers["x-request-id"].startswith("req_")
    failed, line = logged()
    assert failed["request_id"] == line["request_id"] == answer.headers["x-request-id"]
    assert failed["traceback"].startswith("Traceback")
    assert (line["level"], line["status"]) == ("error", 500)
    assert samples(metrics)["optkit:http_requests_total", "unknown", "GET", "500"] == 1


def test_an_answer_that_the_application_made_of_a_failure_stays_and_is_logged_once(logged):
    app = FastAPI()

    @app.get("/fails/{what}")
    async def fails(what: str) -> None:
        raise ValueError(what)

    @app.exception_handler(Exception)
    async def crashed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(internal().body(), 500)

    [answer] = ask(Observed(app, Metrics()), ("GET", "/fails/inside"))
    assert (answer.status_code, answer.json()) == (500, internal().body())
    failed, line = logged()
    assert "ValueError: inside" in failed["traceback"]
    assert (line["path"], line["status"]) == ("/fails/{what}", 500)


def test_an_answer_that_breaks_off_is_a_failure_of_the_server(logged):
    with pytest.raises(Aborted):
        ask(Observed(breaking, Metrics()), ("GET", "/"))
    failed, line = logged()
    assert "in the middle" in failed["traceback"]
    assert (line["status"], line["error"]) == (500, "ValueError")


def test_machines_that_ask_all_the_time_are_in_the_log_at_level_debug(logged):
    ask(Observed(application(), Metrics()), ("GET", "/health"))
    assert [line["level"] for line in lines(logged)] == ["debug"]


def test_what_is_not_http_passes():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)

    asyncio.run(Observed(app, Metrics())({"type": "lifespan"}, None, None))
    assert seen == [{"type": "lifespan"}]


def test_a_task_that_is_cancelled_stays_cancelled_and_is_logged(logged):
    begun = asyncio.Event()

    async def waiting(scope, receive, send):
        begun.set()
        await asyncio.Event().wait()

    async def main():
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        task = asyncio.create_task(Observed(waiting, Metrics())(scope, None, None))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [(line["status"], line["error"]) for line in logged()] == [(499, "cancelled")]


# --- over a socket


def over_a_socket(app, talk) -> None:
    """Run uvicorn as the server does, and `talk(reader, writer, over)`; `over` is set after each request."""

    async def main():
        over = asyncio.Event()

        async def noticed(scope, receive, send):
            try:
                await app(scope, receive, send)
            finally:
                over.set()

        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(noticed, log_config=None, access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await talk(reader, writer, over)
            writer.close()
        finally:
            server.should_exit = True
            await serving

    asyncio.run(main())


def test_an_answer_that_breaks_off_ends_the_connection_and_has_one_traceback(logged):
    async def talk(reader, writer, over):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        got = await reader.read()
        assert got.count(b"x-request-id: req_") == 1
        assert b"another" not in got
        assert got.endswith(b"part\r\n")  # without the last chunk, so clients know

    over_a_socket(Observed(breaking, Metrics()), talk)
    assert sum("traceback" in line for line in logged()) == 1
    assert [line["status"] for line in lines(logged)] == [500]
    assert not [line for line in logged() if "ASGI" in line["event"]]


def test_a_client_that_leaves_is_no_failure(samples, logged):
    metrics = Metrics()
    app = FastAPI()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            await asyncio.Event().wait()

        return StreamingResponse(parts())

    async def talk(reader, writer, over):
        writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"first")
        writer.close()
        await over.wait()

    over_a_socket(Observed(app, metrics), talk)
    [line] = lines(logged)
    assert (line["level"], line["path"], line["status"]) == ("info", "/stream", 499)
    assert samples(metrics)["optkit:http_requests_total", "/stream", "GET", "499"] == 1
    assert not [line for line in logged() if "traceback" in line]


def test_a_client_that_leaves_before_its_body_came_is_no_failure(logged):
    app = FastAPI()

    @app.post("/body")
    async def body(request: Request) -> dict[str, int]:
        return {"length": len(await request.body())}

    async def talk(reader, writer, over):
        writer.write(b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\npart")
        await writer.drain()
        writer.close()
        await over.wait()

    over_a_socket(Observed(app, Metrics()), talk)
    assert [line["status"] for line in lines(logged)] == [499]
    assert not [line for line in logged() if "traceback" in line]
