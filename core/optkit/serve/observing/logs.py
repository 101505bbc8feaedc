"""Logs as JSON, one object a line, whoever writes them."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from optkit.serve.observing.record import Aborted

__all__ = ["configure"]

_NAMES = {"asctime": "time", "levelname": "level", "name": "logger", "message": "event", "exc_info": "traceback"}


def configure(stream: TextIO | None = None, level: int | str = logging.INFO) -> None:
    """Send what this process logs and warns about to `stream`, instead of anywhere that was set before.

    Every line has `time` (RFC 3339, UTC), `level`, `logger` and `event`, and more by its kind. What a client sends
    cannot begin a line of its own: JSON escapes line breaks and control characters.

    Args:
        stream: standard error by default.
        level: the least that is written.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Lines([*list(_NAMES)[:4]], rename_fields=_NAMES, reserved_attrs=_RESERVED))
    handler.addFilter(_told_already)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for logger in map(logging.getLogger, list(logging.root.manager.loggerDict)):
        if logger.handlers:
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)
    # The line of each request says more.
    access = logging.getLogger("uvicorn.access")
    access.handlers, access.propagate = [logging.NullHandler()], False


_RESERVED = [*RESERVED_ATTRS, "color_message"]


class _Lines(JsonFormatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        moment = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
        return f"{moment.isoformat(timespec='milliseconds')}Z"

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        log_data["level"] = log_data["level"].lower()
        return log_data


def _told_already(record: logging.LogRecord) -> bool:
    """Leave out uvicorn's traceback for answers that broke off: their requests' own lines tell more."""
    error = record.exc_info[1] if record.exc_info else None
    return not (record.name == "uvicorn.error" and isinstance(error, Aborted | asyncio.CancelledError))
