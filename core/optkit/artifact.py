"""The artifact: a directory that any machine can verify, benchmark and serve. Written whole or not at all.

manifest.json    what it is, how it was made, and the SHA-256 of every other file
recipe.yaml      as given
report.json      quality and speed against the baseline; report.html shows the same
weights/         a standard Hugging Face folder
runtime/         what the backend compiled
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from optkit.errors import DamagedError, MachineError, MissingError, OptkitError

__all__ = [
    "FORMAT",
    "Artifact",
    "FileRecord",
    "Manifest",
    "StepRecord",
    "check_files",
    "hash_files",
    "open_artifact",
    "publish",
    "staging",
    "writing",
]

FORMAT = 1
_BLANK = "0" * 64
_ASIDE = "-old"
_CLOCK_SECONDS = 10
"""What the system's two clocks for processes and for files may differ by."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


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
    kv_cache_tokens: int | None = None
    """Tokens of KV cache in all, as the recipe says; None leaves it to the memory of the machine that opens it."""
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
    entries = (found for found in path.rglob("*") if found.is_symlink() or not found.is_dir())
    present = {str(found.relative_to(path)) for found in entries} - {"manifest.json"}
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
def writing(place: Path, what: str = "", remedy: str = "") -> Iterator[None]:
    """Say in one line that nothing can be written below `place`. Other errors pass through.

    Args:
        place: a directory, there or not.
        what: its name for people, for example `the cache`.
        remedy: what the user can do about it.

    Raises:
        MachineError: the disk is full, or something in or beside `place` cannot be made, written or moved.
    """
    try:
        yield
    except OptkitError:
        raise
    except Exception as error:
        reason = _refusal(error, place)
        if reason is None:
            raise
        raise MachineError(f"{what} cannot be written ({reason})".strip(), where=str(place), remedy=remedy) from error


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` to write into; removed at the end if it is still there.

    What killed processes left beside `target` is removed, or put back where it is the artifact that stood there.

    Raises:
        MachineError: the directory of `target` cannot be written.
    """
    with writing(target, remedy="choose another output"):
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{glob.escape(f'.{target.name}.staging-')}*"):
            if _abandoned(left):
                _clear(left, target)
        directory = target.parent / f".{target.name}.staging-{secrets.token_hex(4)}-{os.getpid()}"
        directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(staged: Path, target: Path, facts: Mapping[str, Any]) -> Artifact:
    """Make the staged files the artifact at `target`, in one step: a crash leaves the old artifact or the new one.

    Where the file system cannot exchange two directories, a crash may also leave nothing at `target` until the next
    `staging(target)` puts the old artifact back.

    Args:
        staged: a directory from `staging(target)`, with everything but the manifest in it.
        target: where the artifact shall stand; what is there is replaced.
        facts: the manifest's fields but `format`, `digest` and `files`.

    Raises:
        MachineError: the disk is full, or the directory of `target` cannot be written.
    """
    with writing(target, remedy="choose another output"):
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
        return
    # By the target's name and not the staging place's: a rejected artifact must not come back as a published one.
    aside = target.with_name(f".{target.name}.staging-{new.name.rpartition('.staging-')[2]}{_ASIDE}")
    target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _clear(left: Path, target: Path) -> None:
    if left.name.endswith(_ASIDE) and not target.exists():
        left.rename(target)
    else:
        shutil.rmtree(left, ignore_errors=True)


def _refusal(error: Exception, place: Path) -> str | None:
    if isinstance(error, shutil.Error):  # of copytree: everything that failed
        return str(error.args[0][0][2])
    if isinstance(error, OSError):
        named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        ours = any(name.is_relative_to(place.parent) or place.is_relative_to(name) for name in named)
        reason = "a file is in the way" if isinstance(error, FileExistsError) else error.strerror or str(error)
        return reason if ours or error.errno in _FULL else None
    # Libraries written in Rust, safetensors among them, say it only in words.
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number and int(number[1]) in _FULL else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _abandoned(staged: Path) -> bool:
    """Whether the process that made the directory is gone, though another one may have got its number."""
    import psutil

    try:
        maker = psutil.Process(int(staged.name.removesuffix(_ASIDE).rpartition("-")[2]))
        return bool(maker.create_time() > staged.stat().st_mtime + _CLOCK_SECONDS)
    except (ValueError, OSError, psutil.Error):
        return True
