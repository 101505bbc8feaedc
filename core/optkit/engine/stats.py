"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats"]


@dataclass(slots=True)
class Stats:
    """What an engine has done since it was made, and how it stands."""

    steps: int = 0
    requests: int = 0
    """Accepted."""
    prompt_tokens: int = 0
    """Computed, those of evicted requests again."""
    output_tokens: int = 0
    recomputed: int = 0
    """Requests evicted to be computed again; one that is evicted twice counts twice."""
    swapped: int = 0
    """Requests evicted to host memory."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    looked_up_tokens: int = 0
    """Prompt tokens looked for in it."""
    drafted: int = 0
    accepted: int = 0
    """Of the drafted tokens, those that were what the model itself says."""
    waiting: int = 0
    running: int = 0
    """Requests."""
    blocks: int = 0
    used_blocks: int = 0
