"""Who is next. A smaller number comes first; it is fixed when a request arrives, so that nobody can starve.

Waiting lowers everybody's number alike, so their order does not depend on the time: a request of one more level of
priority is overtaken only by those that come within `patience` seconds after it.
"""

from __future__ import annotations

from collections.abc import Callable

from optkit.batching import RequestView

__all__ = ["ORDERS"]


def fcfs(request: RequestView, _patience: float) -> float:
    """First come, first served."""
    return request.arrived


def priority(request: RequestView, patience: float) -> float:
    """A level of priority is worth `patience` seconds."""
    return request.arrived + patience * request.priority


def shortest_prompt(request: RequestView, patience: float) -> float:
    """A thousand tokens of prompt are worth `patience` seconds."""
    return request.arrived + patience * request.prompt_tokens / 1000


ORDERS: dict[str, Callable[[RequestView, float], float]] = {
    "fcfs": fcfs,
    "priority": priority,
    "shortest_prompt": shortest_prompt,
}
