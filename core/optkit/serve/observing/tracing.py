"""Traces, when the operator names a collector for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from optkit.errors import MissingError
from optkit.serve.observing.record import Record

__all__ = ["Tracing", "tracer_for"]


class Tracing(Protocol):
    """Makes one span of each request."""

    def begin(self, record: Record, headers: Iterable[tuple[bytes, bytes]]) -> Any:
        """Start a span, as a child of the one that the headers name."""

    def end(self, span: Any, record: Record) -> None:
        """End a span with what its request became."""

    async def close(self) -> None:
        """Deliver what is left, within a few seconds."""


def tracer_for(endpoint: str | None) -> Tracing | None:
    """What makes spans and delivers them to a collector; None without one.

    Args:
        endpoint: of OTLP over HTTP, such as `http://localhost:4318`; `/v1/traces` is added where it is missing.

    Raises:
        MissingError: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return None
    try:
        from optkit.serve.observing.spans import Spans
    except ImportError as error:
        raise MissingError(
            "traces need OpenTelemetry, which is not installed",
            where="otlp_endpoint",
            found=endpoint,
            remedy="pip install 'optkit[otel]'",
        ) from error
    return Spans(endpoint)
