"""The step cache: what was made once from the same inputs is not made again. Failures are never cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optkit.artifact import FileRecord, check_files, hash_files
from optkit.errors import MachineError
from optkit.locations import cache_root

__all__ = ["CachedStep", "StepCache", "key_of", "locked"]


@dataclass(frozen=True, slots=True)
class CachedStep:
    """The result of a step."""

    key: str
    name: str
    data: Path
    """The directory that the step wrote."""
    report: dict[str, Any]
    """What it measured, JSON-able."""
    seconds: float
    """Of the run that made it."""
    hit: bool
    """Whether it was there already."""


class StepCache:
    """Results of steps, by key, below one directory.

    A result is written into a temporary directory and renamed, so that a crash leaves nothing half-made. It is verified
    against its hashes before it is used again. A lock per key makes sixteen processes do a step once.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or cache_root()) / "steps"

    def run(self, key: str, name: str, work: Callable[[Path], dict[str, Any]]) -> CachedStep:
        """The result under `key`, made by `work` if it is not there.

        Args:
            key: from `key_of`, over everything that decides the result.
            name: of the step, for people.
            work: writes into the empty directory that it is given and returns a JSON-able report.

        Raises:
            MachineError: the cache cannot be written. What `work` raises passes through.
        """
        with locked(key):
            found = self._read(key)
            return found if found is not None else self._make(key, name, work)

    def entries(self) -> Iterator[tuple[CachedStep, int, float]]:
        """Every cached step with its bytes and the time it was last used, in seconds since the epoch."""
        for directory in sorted(self.root.glob("*")):
            step = None if directory.name.startswith(".") else self._load(directory.name)
            if step is not None:
                size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
                yield step, size, (directory / "step.json").stat().st_mtime

    def clear(self, *, unused_for: float = 0.0) -> int:
        """Remove steps not used for so many seconds, and leftovers of killed runs; returns the bytes freed."""
        freed = 0
        for step, size, used in list(self.entries()):
            if time.time() - used >= unused_for:
                with locked(step.key):
                    shutil.rmtree(self.root / step.key, ignore_errors=True)
                freed += size
        self._sweep()
        return freed

    def _make(self, key: str, name: str, work: Callable[[Path], dict[str, Any]]) -> CachedStep:
        self._sweep()
        temporary = self.root / f".{key[:16]}-{os.getpid()}"
        try:
            (temporary / "data").mkdir(parents=True)
            started = time.perf_counter()
            report = work(temporary / "data")
            seconds = time.perf_counter() - started
            files = {path: record.model_dump() for path, record in hash_files(temporary / "data").items()}
            facts = {"name": name, "report": report, "seconds": seconds, "files": files}
            (temporary / "step.json").write_text(json.dumps(facts), encoding="utf-8")
            shutil.rmtree(self.root / key, ignore_errors=True)  # a damaged one
            temporary.rename(self.root / key)
        except OSError as error:
            raise MachineError(f"the cache cannot be written ({error})", where=str(self.root)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return CachedStep(key, name, self.root / key / "data", report, seconds, hit=False)

    def _read(self, key: str) -> CachedStep | None:
        step = self._load(key)
        if step is None:
            return None
        facts = json.loads((self.root / key / "step.json").read_text(encoding="utf-8"))
        files = {path: FileRecord.model_validate(record) for path, record in facts["files"].items()}
        if not check_files(step.data, files):
            return None
        os.utime(self.root / key / "step.json")
        return step

    def _load(self, key: str) -> CachedStep | None:
        try:
            facts = json.loads((self.root / key / "step.json").read_text(encoding="utf-8"))
            return CachedStep(key, facts["name"], self.root / key / "data", facts["report"], facts["seconds"], hit=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _sweep(self) -> None:
        for leftover in self.root.glob(".*-*"):
            if not Path("/proc", leftover.name.rpartition("-")[2]).exists():
                shutil.rmtree(leftover, ignore_errors=True)


def key_of(**inputs: Any) -> str:
    """SHA-256 over JSON-able inputs, in hexadecimal; the order of the arguments does not matter."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock called `name`, among all processes that share the cache. Released when the process dies."""
    from filelock import FileLock

    directory = cache_root() / "locks"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"the cache cannot be written ({error.strerror})", where=str(directory)) from error
    with FileLock(directory / f"{name}.lock"):
        yield
