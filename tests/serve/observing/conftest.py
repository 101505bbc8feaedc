"""What is logged, as lines of JSON, and what is counted, as Prometheus reads it."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from optkit.serve.observing.logs import configure
from optkit.serve.observing.metrics import Metrics

_LABELS = ["model_name", "path", "method", "status", "finished_reason", "reason", "le", "version", "python"]


@pytest.fixture
def logged() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """`logged()` gives all lines so far. Logging is as it was afterwards."""
    quiet = [logging.getLogger(name) for name in ("asyncio", "httpx", "httpcore")]
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(one, list(one.handlers), one.level, one.propagate) for one in (logging.root, *known)]
    show = warnings.showwarning
    logging.root.handlers.clear()  # or pytest's own would be closed
    stream = io.StringIO()
    configure(stream, logging.DEBUG)
    for one in quiet:
        one.setLevel(logging.WARNING)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logging.captureWarnings(False)
    warnings.showwarning = show
    for one, handlers, level, propagate in before:
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture(scope="session")
def samples() -> Callable[[Metrics], dict[tuple[str, ...], float]]:
    """`samples(metrics)` gives values by name and labels' values."""

    def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
        found = {}
        for family in text_string_to_metric_families(metrics.render().decode()):
            for one in family.samples:
                values = (one.labels[label] for label in sorted(one.labels, key=_LABELS.index))
                found[(one.name, *values)] = one.value
        return found

    return read
