"""What the control groups of this process allow: containers are limited there, and /proc/meminfo does not know it.

Documents: cgroups(7); Linux `Documentation/admin-guide/cgroup-v2.rst`, and `cgroup-v1/memory.rst` for version 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["MemoryLimit", "cpu_quota", "memory_limits"]

PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One group's share of memory, in bytes."""

    limit: int
    used: int
    """Without the file cache, which the kernel gives back under pressure."""


def cpu_quota(proc: Path = PROC) -> float:
    """Cores' worth of time that the tightest enclosing group may use; infinite where nothing limits it.

    Args:
        proc: the process's own folder in /proc.
    """
    quotas = [float("inf")]
    for group in _groups("cpu", proc):
        if (group / "cpu.max").is_file():
            quota, _, period = _text(group / "cpu.max").partition(" ")
        else:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # version 2 says "max", version 1 says -1
            quotas.append(int(quota) / int(period))
    return min(quotas)


def memory_limits(proc: Path = PROC) -> Iterator[MemoryLimit]:
    """The limit of every enclosing group that has one.

    Args:
        proc: the process's own folder in /proc.
    """
    names = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for group in _groups("memory", proc):
        for limit_name, used_name, cached_name in names:
            limit, used = _text(group / limit_name), _text(group / used_name)
            if limit.isdecimal() and used.isdecimal():
                statistics = dict(line.split() for line in _text(group / "memory.stat").splitlines())
                yield MemoryLimit(int(limit), max(0, int(used) - int(statistics.get(cached_name, 0))))


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Folders of the groups around this process that hold `controller`'s files, innermost first."""
    paths = {}
    for line in _text(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    for line in _text(proc / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        root, mounted = left.split()[3:5]
        kind, *_, options = right.split()
        if kind == "cgroup2":
            path = paths.get("", "/")
        elif kind == "cgroup" and controller in options.split(","):
            path = paths.get(controller, "/")
        else:
            continue
        # Seen from inside a container, the path may be the host's while the mount shows only the container's part.
        inside = PurePosixPath(path).relative_to(root) if PurePosixPath(path).is_relative_to(root) else PurePosixPath()
        for part in (inside, *inside.parents):
            yield Path(mounted) / part


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
