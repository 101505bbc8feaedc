"""The artifact: a directory that any machine can verify, benchmark and serve. Written whole or not at all.

manifest.json    what it is, how it was made, and the SHA-256 of every other file
recipe.yaml      as given
report.json      quality and speed against the baseline; report.html shows the same
weights/         a standard Hugging Face folder
runtime/         what the backend compiled
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from optkit.errors import DamagedError, MachineError, MissingError

__all__ = [
    "FORMAT",
    "Artifact",
    "FileRecord",
    "Manifest",
    "StepRecord",
    "hash_files",
    "open_artifact",
    "publish",
    "staging",
]

FORMAT = 1
_BLANK = "0" * 64


class FileRecord(BaseModel):
    """Size and hash of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class StepRecord(BaseModel):
    """One step of the apply that made the artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: str
    """What it did, for example `quantize.rtn` or `compile`."""
    distribution: str
    version: str
    options: dict[str, Any]
    key: str
    """SHA-256 over everything that decides the step's result."""
    seconds: float
    """Of the run that made the result, cached or not."""
    effect: dict[str, Any]
    """Measured, in the units of the metrics named."""


class Manifest(BaseModel):
    """The contents of `manifest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    digest: str
    """SHA-256 of `manifest.json` itself, with 64 zeros in the place of this value."""
    name: str
    recipe: dict[str, Any]
    """The resolved recipe, every default filled in."""
    recipe_hash: str
    tags: list[str]
    max_batch_size: int
    max_length: int
    steps: list[StepRecord]
    servable_by: list[str]
    """What can run the `weights` folder besides the artifact's own backend."""
    machine: dict[str, Any]
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact whose files are what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def runtime(self) -> Path:
        return self.path / "runtime"

    def report(self) -> dict[str, Any]:
        """The contents of `report.json`."""
        return dict(json.loads((self.path / "report.json").read_text(encoding="utf-8")))


def open_artifact(path: Path, *, verify: bool = True) -> Artifact:
    """Open an artifact.

    Args:
        path: its directory.
        verify: also read every file and compare its hash. Without it only the manifest is checked, and that the files
            are there in their sizes; right for a first look, wrong before running anything.

    Raises:
        MissingError: there is no artifact.
        DamagedError: a file is missing, changed, or not in the manifest.
    """
    file = path / "manifest.json"
    if not file.is_file():
        raise MissingError(
            "no artifact here", where=str(path), remedy="optkit apply RECIPE --output DIRECTORY makes one"
        )
    manifest = _read_manifest(file)
    present = {str(found.relative_to(path)) for found in path.rglob("*") if not found.is_dir()} - {"manifest.json"}
    for name in sorted(present - manifest.files.keys()):
        if name.startswith(("weights/", "runtime/")):
            raise DamagedError(
                "not in the manifest", where=str(path / name), remedy="remove it or apply the recipe again"
            )
    for name, record in manifest.files.items():
        found = path / name
        if name not in present or found.is_symlink():
            raise DamagedError("missing from the artifact", where=str(found), remedy="apply the recipe again")
        if found.stat().st_size != record.bytes or (verify and _sha256(found) != record.sha256):
            raise DamagedError("changed since it was written", where=str(found), remedy="apply the recipe again")
    return Artifact(path, manifest)


def hash_files(directory: Path) -> dict[str, FileRecord]:
    """Size and hash of every file below `directory`, by its path relative to it, sorted."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {
        file.relative_to(directory).as_posix(): FileRecord(bytes=file.stat().st_size, sha256=_sha256(file))
        for file in files
    }


def check_files(directory: Path, files: Mapping[str, FileRecord]) -> bool:
    """Whether `directory` holds exactly these files with these bytes."""
    return hash_files(directory) == dict(files)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` to write into; removed at the end if it is still there.

    Raises:
        MachineError: the directory of `target` cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{target.name}.staging-*"):
            if not _alive(stale.name.rpartition("-")[2]):
                shutil.rmtree(stale, ignore_errors=True)
        directory = target.parent / f".{target.name}.staging-{secrets.token_hex(4)}-{os.getpid()}"
        directory.mkdir()
    except OSError as error:
        raise MachineError(
            f"cannot be written ({error.strerror})", where=str(target), remedy="choose another output"
        ) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(staged: Path, target: Path, facts: Mapping[str, Any]) -> Artifact:
    """Make the staged files the artifact at `target`, in one step: a crash leaves the old artifact or the new one.

    Args:
        staged: a directory from `staging(target)`, with everything but the manifest in it.
        target: where the artifact shall stand; what is there is replaced.
        facts: the manifest's fields but `format`, `digest` and `files`.
    """
    manifest = Manifest(format=FORMAT, digest=_BLANK, files=hash_files(staged), **facts)
    text = manifest.model_dump_json(indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (staged / "manifest.json").write_text(text.replace(_BLANK, digest, 1), encoding="utf-8")
    for file in [*staged.rglob("*"), staged]:
        _sync(file)
    _exchange(staged, target)
    _sync(target.parent)
    return Artifact(target, manifest.model_copy(update={"digest": digest}))


def _read_manifest(file: Path) -> Manifest:
    try:
        text = file.read_text(encoding="utf-8")
        digest = json.loads(text).get("digest", "")
        blanked = text.replace(digest, _BLANK, 1) if digest else text
        if hashlib.sha256(blanked.encode()).hexdigest() != digest:
            raise DamagedError("changed since it was written", where=str(file), remedy="apply the recipe again")
        return Manifest.model_validate_json(text)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, ValidationError) as error:
        reason = "of an unknown format" if isinstance(error, ValidationError) else "not readable"
        raise DamagedError(f"the manifest is {reason}", where=str(file), remedy="apply the recipe again") from error


def _exchange(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    # RENAME_EXCHANGE swaps two directories atomically; the old one is then removed from the staging place.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2
    if renameat2 is not None and renameat2(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0:
        shutil.rmtree(new)
        return
    aside = new.with_name(new.name + "-old")
    target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: str) -> bool:
    return pid.isdigit() and Path("/proc", pid).exists()
