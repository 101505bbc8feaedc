"""What is noted about one request while it is under way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from optkit.engine.request import FinishReason

__all__ = ["QUIET", "UNKNOWN", "Aborted", "Record"]

UNKNOWN = "unknown"
"""Stands for every path that no route has."""
QUIET = {"/health", "/ready", "/metrics"}
"""Asked for every few seconds by machines: no spans, and in the log only when they fail or at level debug."""


class Aborted(Exception):
    """An answer broke off in the middle, and its connection must end with it. The reason is in the log already."""


@dataclass(slots=True)
class Record:
    """Of one request: begun by the middleware, filled by whoever learns something, written to the log at the end.

    Never has words of a prompt, a key, or a path as the client wrote it.
    """

    request_id: str
    method: str = ""
    path: str = UNKNOWN
    """Template of its route, such as `/v1/files/{file_id}`."""
    status: int = 0
    """Of HTTP; 0 until an answer begins, 499 when the client left before its end."""
    model: str = ""
    """A loaded model's name, never what a client made up."""
    tenant: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's, those found in the prefix cache."""
    output_tokens: int = 0
    finish_reasons: list[FinishReason] = field(default_factory=list)
    """One for each choice."""
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    """When it was there, by the same clock as `started`."""
    error: str = ""
    """For the log only."""
    stream: bool = False
    client_request_id: str = ""
    """What the client calls it, from `x-client-request-id`."""

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token, if there was one."""
        return None if self.first_token is None else self.first_token - self.started
