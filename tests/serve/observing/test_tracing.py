"""Spans reach a collector as OTLP; without one nothing is sent, and one that is away holds nobody up."""

from __future__ import annotations

import asyncio
import queue
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from optkit.errors import MissingError
from optkit.serve.observing.metrics import Metrics
from optkit.serve.observing.middleware import Observed
from optkit.serve.observing.tracing import tracer_for

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP, as collectors do."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.requests: queue.Queue[tuple[str, bytes]] = queue.Queue()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def spans(self) -> list[Any]:
        """Of all requests so far."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        found = []
        while not self.requests.empty():
            path, body = self.requests.get_nowait()
            assert path == "/v1/traces"
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                assert values(resource.resource)["service.name"] == "optkit"
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return found


class _Post(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.put((self.path, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def values(holder: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {one.key: plain(one.value) for one in holder.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def application() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, str]:
        record = request.scope["state"]["record"]
        record.model, record.tenant, record.stream = "m", "acme", True
        record.prompt_tokens, record.cached_tokens, record.output_tokens = 10, 4, 3
        record.finish_reasons += ["stop", "length"]
        record.first_token = record.started
        record.error = "never leaves the log"
        return {}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.get("/fails")
    async def fails() -> None:
        raise ValueError("never leaves the log")

    return app


def ask(endpoint: str | None, *requests: tuple[str, str], headers: dict[str, str] | None = None) -> None:
    async def main() -> None:
        tracer = tracer_for(endpoint)
        transport = httpx.ASGITransport(Observed(application(), Metrics(), tracer), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            for method, url in requests:
                await client.request(method, url)
        if tracer is not None:
            await tracer.close()

    asyncio.run(main())


def test_a_request_is_a_span_with_the_conventions_attributes(collector):
    ask(collector.url, ("POST", "/v1/chat/completions?key=secret"), headers={"traceparent": PARENT})
    [span] = collector.spans()
    assert span.name == "POST /v1/chat/completions"
    assert span.kind == span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    found = values(span)
    assert found.pop("optkit.request_id").startswith("req_")
    assert found == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "optkit",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "gen_ai.response.time_to_first_chunk": 0.0,
    }
    [event] = span.events
    assert event.name == "first_token"
    assert abs(event.time_unix_nano - span.start_time_unix_nano) < 1e9
    assert span.end_time_unix_nano >= span.start_time_unix_nano
    assert b"never leaves" not in span.SerializeToString()


def test_a_failure_is_a_span_with_an_error_and_what_machines_poll_is_none(collector):
    ask(collector.url + "/v1/traces", ("GET", "/health"), ("GET", "/fails"), ("GET", "/private"))
    failed, unknown = collector.spans()
    assert failed.status.code == failed.status.STATUS_CODE_ERROR
    assert (values(failed)["error.type"], values(failed)["http.response.status_code"]) == ("500", 500)
    assert not failed.parent_span_id
    assert (unknown.name, unknown.status.code) == ("GET unknown", 0)
    assert b"never leaves" not in failed.SerializeToString()
    assert b"private" not in unknown.SerializeToString()


def test_a_parent_that_is_not_sampled_has_no_children(collector):
    ask(collector.url, ("POST", "/v1/chat/completions"), headers={"traceparent": PARENT[:-1] + "0"})
    assert collector.spans() == []


@pytest.mark.parametrize("parent", ["", "00-nonsense", "x" * 5000, "\xff"])
def test_a_parent_that_cannot_be_read_is_none(collector, parent):
    ask(collector.url, ("GET", "/private"), headers={"traceparent": parent.encode("latin-1")})
    [span] = collector.spans()
    assert not span.parent_span_id


def test_a_collector_that_is_away_is_told_of_once(logged, monkeypatch):
    spans = pytest.importorskip("optkit.serve.observing.spans")
    monkeypatch.setattr(spans, "_DELIVERY_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1/traces"
    exporter = spans._Patient(url)
    assert [exporter.export([]) for _ in range(3)] == [spans.SpanExportResult.FAILURE] * 3
    exporter.shutdown()
    [line] = [line for line in logged() if line["level"] != "debug"]
    assert (line["level"], line["logger"]) == ("warning", "optkit.serve.observing.spans")


def test_a_collector_that_never_answers_does_not_hold_up_the_end(logged, monkeypatch):
    spans = pytest.importorskip("optkit.serve.observing.spans")
    monkeypatch.setattr(spans, "_CLOSING_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        ask(f"http://127.0.0.1:{mute.getsockname()[1]}", ("GET", "/private"))
        # It ended while the delivery, which would take seconds, was under way.
        assert any(thread.name == "optkit-spans" for thread in threading.enumerate())


def test_without_an_endpoint_nothing_is_traced_and_nothing_imported():
    assert tracer_for(None) is None


def test_a_missing_extra_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "optkit.serve.observing.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingError, match=r"pip install 'optkit\[otel\]'"):
        tracer_for("http://localhost:4318")
