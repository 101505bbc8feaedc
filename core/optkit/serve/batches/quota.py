"""What files and batches may come to, so that no client fills the disk or the queue of the others."""

from __future__ import annotations

from pydantic import Field

from optkit.options import Options

__all__ = ["ENDPOINTS", "WINDOW_SECONDS", "Quota"]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""What lines can ask."""

WINDOW_SECONDS = 24 * 3600
"""The only completion window that there is, OpenAI's `24h`."""


class Quota(Options):
    """Bounds of one tenant's files and batches. OpenAI's where it has one."""

    lines: int = Field(default=50_000, ge=1)
    """Of one batch."""
    line_bytes: int = Field(default=8 << 20, ge=1024)
    """Of one line. As much as a request's body may have."""
    file_bytes: int = Field(default=200 << 20, ge=1024)
    """Of one uploaded file."""
    files: int = Field(default=1000, ge=1)
    """Uploaded and produced. With that many there is no new upload and no new batch."""
    total_bytes: int = Field(default=8 << 30, ge=1024)
    """Of all of them. With more there is no new upload and no new batch; a running batch still ends with its files."""
    open_batches: int = Field(default=32, ge=1)
    """Not ended yet."""
    kept_batches: int = Field(default=10_000, ge=1)
    """Ended. The oldest beyond them are forgotten; their files stay until they are deleted."""
