"""One span of each request, delivered by OTLP over HTTP.

Attributes are named by OpenTelemetry's conventions for HTTP servers and for generative AI:
https://opentelemetry.io/docs/specs/semconv/http/http-spans/, https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_SERVICE_NAME
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from optkit import __version__
from optkit.serve.observing.record import Record

__all__ = ["Spans"]

_log = logging.getLogger(__name__)

_PATH = "/v1/traces"
_WAITING = 2048
"""Spans that wait for delivery; the oldest are dropped for newer ones."""
_BATCH = 256
_EVERY_MS = 2000
_DELIVERY_SECONDS = 5.0
_CLOSING_SECONDS = 5.0
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}


class Spans:
    """Makes spans in the event loop and delivers them in a thread. A collector that does not answer costs spans only.

    Args:
        endpoint: of the collector; `/v1/traces` is added where it is missing.
    """

    def __init__(self, endpoint: str) -> None:
        url = endpoint.rstrip("/")
        exporter = _Patient(url if url.endswith(_PATH) else url + _PATH)
        facts = {SERVICE_NAME: os.environ.get(OTEL_SERVICE_NAME) or "optkit", SERVICE_VERSION: __version__}
        self._provider = TracerProvider(resource=Resource.create(facts), shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=_WAITING,
                max_export_batch_size=_BATCH,
                schedule_delay_millis=_EVERY_MS,
            )
        )
        self._tracer = self._provider.get_tracer("optkit.serve", __version__)
        self._parents = TraceContextTextMapPropagator()

    def begin(self, record: Record, headers: Iterable[tuple[bytes, bytes]]) -> Span:
        """Start a span, as a child of the one that `traceparent` names."""
        carrier = {
            name.decode("ascii"): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        return self._tracer.start_span(
            record.method,
            self._parents.extract(carrier),
            SpanKind.SERVER,
            start_time=time.time_ns(),
        )

    def end(self, span: Span, record: Record) -> None:
        """End a span with what its request became. Words of a prompt or an answer are never in it."""
        now, age = time.time_ns(), time.monotonic() - record.started
        if span.is_recording():
            span.update_name(f"{record.method} {record.path}")
            span.set_attributes(
                {
                    "http.request.method": record.method,
                    "http.route": record.path,
                    "http.response.status_code": record.status,
                    "optkit.request_id": record.request_id,
                }
            )
            if record.status >= 500:
                span.set_attribute("error.type", str(record.status))
                span.set_status(Status(StatusCode.ERROR))
            if record.model:
                _describe(span, record)
            if record.ttft is not None:
                span.set_attribute("gen_ai.response.time_to_first_chunk", record.ttft)
                span.add_event("first_token", timestamp=now - int((age - record.ttft) * 1e9))
        span.end(now)

    async def close(self) -> None:
        """Deliver what is left, for a few seconds at most."""
        await asyncio.to_thread(self._shut)

    def _shut(self) -> None:
        # The provider's own way waits for half a minute.
        thread = threading.Thread(target=self._provider.shutdown, name="optkit-spans", daemon=True)
        thread.start()
        thread.join(_CLOSING_SECONDS)


def _describe(span: Span, record: Record) -> None:
    if record.path in _OPERATIONS:
        span.set_attribute("gen_ai.operation.name", _OPERATIONS[record.path])
    span.set_attributes(
        {
            "gen_ai.provider.name": "optkit",
            "gen_ai.request.model": record.model,
            "gen_ai.response.model": record.model,
            "gen_ai.request.stream": record.stream,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
        }
    )
    if record.finish_reasons:
        span.set_attribute("gen_ai.response.finish_reasons", record.finish_reasons)


class _Patient(SpanExporter):
    """Says once that the collector does not answer, and once that it does again."""

    def __init__(self, url: str) -> None:
        # It would say so for every batch, and for every span that finds no room.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._exporter = OTLPSpanExporter(url, timeout=_DELIVERY_SECONDS)
        self._failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        failing = result is not SpanExportResult.SUCCESS
        if failing and not self._failing:
            _log.warning("the collector of traces does not take them; they are dropped until it does")
        if self._failing and not failing:
            _log.info("the collector of traces takes them again")
        self._failing = failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
