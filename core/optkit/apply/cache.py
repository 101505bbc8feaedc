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

from optkit.artifact import FileRecord, check_files, hash_files, writing
from optkit.checkpoints import Checkpoint
from optkit.locations import cache_root

__all__ = ["CachedStep", "StepCache", "key_of", "locked", "sweep", "workplace"]

_REMEDY = "optkit cache clear frees old steps, OPTKIT_CACHE names another place"


@dataclass(frozen=True, slots=True)
class CachedStep:
    """The result of a step."""

    key: str
    name: str
    data: Path
    """The directory that the step wrote."""
    report: dict[str, Any]
    """What it measured, as JSON gives it back."""
    seconds: float
    """Of the run that made it."""
    hit: bool
    """Whether it was there already."""


class StepCache:
    """Results of steps, by key, below the cache's root.

    A result is made in a work place and renamed, so that a crash leaves nothing half-made. Before it is used again
    every byte is verified. A lock per key makes sixteen processes do a step once.
    """

    def __init__(self) -> None:
        self.root = cache_root() / "steps"

    def checkpoint(self, key: str) -> Checkpoint:
        """What the step under `key` keeps of unfinished work. Gone once its result is there."""
        return Checkpoint(self._unfinished(key))

    def _unfinished(self, key: str) -> Path:
        return cache_root() / "unfinished" / key

    def run(self, key: str, name: str, work: Callable[[Path], dict[str, Any]]) -> CachedStep:
        """The result under `key`, made by `work` if it is not there.

        Args:
            key: from `key_of`, over everything that decides the result.
            name: of the step, for people.
            work: writes into the empty directory that it is given and returns a JSON-able report.

        Raises:
            MachineError: the cache cannot be written. What else `work` raises passes through.
        """
        with locked(key):
            found = self._load(key)
            if found is None:
                return self._make(key, name, work)
            step, files = found
            if not step.data.is_dir() or not check_files(step.data, files):
                return self._make(key, name, work)
            os.utime(self.root / key / "step.json")
            return step

    def entries(self) -> Iterator[tuple[CachedStep, int, float]]:
        """Every cached step with its bytes and the time it was last used, in seconds since the epoch."""
        for directory in sorted(self.root.glob("*")):
            found = self._load(directory.name)
            if found is not None:
                size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
                yield found[0], size, (directory / "step.json").stat().st_mtime

    def clear(self, *, unused_for: float = 0.0) -> int:
        """Remove steps not used for so many seconds, unfinished ones too, and leftovers of killed runs.

        Returns:
            The bytes freed.
        """
        freed = 0
        for step, size, used in list(self.entries()):
            if time.time() - used >= unused_for:
                with locked(step.key):
                    shutil.rmtree(self.root / step.key, ignore_errors=True)
                freed += size
        for directory in sorted(self._unfinished("").glob("*")):
            files = list(directory.iterdir())
            if time.time() - max((file.stat().st_mtime for file in files), default=0.0) >= unused_for:
                with locked(directory.name, wait=False) as abandoned:
                    if abandoned:
                        freed += sum(file.stat().st_size for file in files)
                        shutil.rmtree(directory, ignore_errors=True)
        sweep()
        return freed

    def _make(self, key: str, name: str, work: Callable[[Path], dict[str, Any]]) -> CachedStep:
        with writing(self.root, "the cache", _REMEDY), workplace(key) as place:
            data = place / "data"
            data.mkdir()
            started = time.perf_counter()
            report = work(data)
            seconds = time.perf_counter() - started
            files = {path: record.model_dump() for path, record in hash_files(data).items()}
            facts = json.loads(json.dumps({"name": name, "report": report, "seconds": seconds, "files": files}))
            sealed = {"digest": key_of(**facts), "facts": facts}
            (place / "step.json").write_text(json.dumps(sealed), encoding="utf-8")
            self.root.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.root / key, ignore_errors=True)  # a damaged one
            place.rename(self.root / key)
            shutil.rmtree(self._unfinished(key), ignore_errors=True)
        return CachedStep(key, name, self.root / key / "data", facts["report"], seconds, hit=False)

    def _load(self, key: str) -> tuple[CachedStep, dict[str, FileRecord]] | None:
        try:
            text = (self.root / key / "step.json").read_text(encoding="utf-8")
            sealed = json.loads(text)
            facts = sealed["facts"]
            # Both: other text may stand for the same figures.
            if key_of(**facts) != sealed["digest"] or json.dumps(sealed) != text:
                return None
            files = {path: FileRecord.model_validate(record) for path, record in facts["files"].items()}
            data = self.root / key / "data"
            return CachedStep(key, facts["name"], data, facts["report"], facts["seconds"], hit=True), files
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def key_of(**inputs: Any) -> str:
    """SHA-256 over JSON-able inputs, in hexadecimal; the order of the arguments does not matter."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def locked(name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock called `name`, among all processes that share the cache. Released when the process dies.

    Args:
        name: of the lock.
        wait: until it is free; if not, the body runs without the lock where another one holds it.

    Yields:
        Whether the lock is held.

    Raises:
        MachineError: the cache cannot be written.
    """
    from filelock import FileLock, Timeout

    directory = cache_root() / "locks"
    with writing(directory, "the cache"):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / f"{name}.lock")
        try:
            lock.acquire(blocking=wait)
            held = True
        except Timeout:
            held = False
    try:
        yield held
    finally:
        lock.release()


@contextmanager
def workplace(name: str) -> Iterator[Path]:
    """An empty directory for the holder of the lock called `name`, removed at the end if it is still there.

    It belongs to whoever holds the lock and not to a process number: those repeat, and mean nothing in another
    container that shares the cache.
    """
    directory = cache_root() / "work" / name
    shutil.rmtree(directory, ignore_errors=True)  # of a holder that was killed
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def sweep() -> None:
    """Remove the work places of killed runs: those whose lock nobody holds."""
    for directory in (cache_root() / "work").glob("*"):
        with locked(directory.name, wait=False) as abandoned:
            if abandoned:
                shutil.rmtree(directory, ignore_errors=True)
