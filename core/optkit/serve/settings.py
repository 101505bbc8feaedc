"""How a server is set up. Everything has a bound, and the command line sets what operators change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from optkit.errors import RecipeError
from optkit.options import Options

__all__ = ["Settings", "with_changes"]

_MIB = 1 << 20


class Settings(Options):
    """Of one server process."""

    host: str = "127.0.0.1"
    """Address to bind. Any but a loopback address needs API keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    max_queue: int = Field(default=256, ge=0)
    """Requests of one model that may wait beyond those that run; one more is refused with 429."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds that a request may take from its arrival; a header can ask for less."""
    drain_timeout: float = Field(default=30.0, ge=0)
    """Seconds that open requests may go on after SIGTERM."""
    max_body_bytes: int = Field(default=8 * _MIB, ge=1024)
    """Of a request, also after decompression. Uploaded files have their own limit."""
    max_file_bytes: int = Field(default=200 * _MIB, ge=1024)
    """Of an uploaded file of requests."""
    max_header_bytes: int = Field(default=32 * 1024, ge=1024)
    """Request line and headers together."""
    header_timeout: float = Field(default=10.0, gt=0)
    """Seconds from a request's first byte, or from the connection, to the end of its headers."""
    body_timeout: float = Field(default=30.0, gt=0)
    """Seconds for the whole body; an uploaded file gets as many for each MiB."""
    write_timeout: float = Field(default=30.0, gt=0)
    """Seconds that a client may leave what was sent unread before it counts as gone."""
    keep_alive_timeout: float = Field(default=15.0, gt=0)
    """Seconds that an idle connection stays open."""
    max_connections: int = Field(default=2048, ge=1)
    """Open at once; one more is closed."""
    state: Path | None = None
    """Directory of uploaded files and batches. None: those endpoints answer that they are switched off."""
    otlp_endpoint: str | None = None
    """Where traces go (OTLP over HTTP). None: nowhere."""


def with_changes(settings: Settings, changes: Sequence[str]) -> Settings:
    """The same settings but for some `NAME=VALUE`.

    Raises:
        RecipeError: there is no such setting, or it does not take the value.
    """
    given = dict(change.partition("=")[::2] for change in changes)
    try:
        known = Settings.model_validate_strings(given)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        name = str(fault["loc"][0])
        unknown = fault["type"] == "extra_forbidden"
        raise RecipeError(
            "there is no such setting" if unknown else f"{fault['msg'][:1].lower()}{fault['msg'][1:]}",
            where=f"--set {name}",
            found=given[name],
            remedy="docs/reference/options.md lists them",
        ) from None
    return settings.model_copy(update={name: getattr(known, name) for name in given})
