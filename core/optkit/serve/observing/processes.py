"""What a process uses."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

__all__ = ["Usage", "usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process at this moment, without its children."""

    resident: int
    """Bytes of memory."""
    cpu: float
    """Seconds of all its threads since it began."""
    files: int
    """Open file descriptors."""


def usage(pid: int) -> Usage | None:
    """Of the process `pid`; None when it is gone, or not ours to look at."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            return Usage(process.memory_info().rss, times.user + times.system, process.num_fds())
    except psutil.Error:
        return None
