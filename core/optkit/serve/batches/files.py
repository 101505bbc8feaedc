"""Uploaded and produced files, under names of the server's own. A file that has its name is whole, and on the disk."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from optkit.artifact import writing

__all__ = ["Files", "Writer"]

_OURS = re.compile(r"file-[0-9a-f]{24}(\.partial)?")


class Files:
    """A directory of them. All of it blocks, so it is called in threads.

    Args:
        directory: made if it is not there, for this user only.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with writing(directory, remedy="choose another --state"):
            directory.mkdir(mode=0o700, exist_ok=True)

    def begin(self) -> Writer:
        """A new file."""
        return Writer(self._directory, f"file-{secrets.token_hex(12)}")

    def open(self, id: str) -> BinaryIO:
        """Read one from its beginning."""
        return self._path(id).open("rb")

    def read(self, id: str, start: int, length: int) -> bytes:
        """Some bytes of one."""
        with self.open(id) as stream:
            stream.seek(start)
            return stream.read(length)

    def remove(self, id: str) -> None:
        """Remove one. Who is reading it reads on."""
        self._path(id).unlink(missing_ok=True)

    def sweep(self, known: Iterable[str]) -> None:
        """Remove all but `known`: what a process left that died between a file and its row, or during an upload.

        Only names that this server gives are touched, whatever else somebody keeps here.
        """
        kept = set(known)
        for path in self._directory.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in kept:
                path.unlink()

    def _path(self, id: str) -> Path:
        # Ids come from rows that this server wrote; this is the second lock on the same door.
        if not _OURS.fullmatch(id):
            raise ValueError("not an id of a file")
        return self._directory / id


class Writer:
    """A file that is being written. It has no name until `publish`, and then it is whole.

    The order matters, because after a power failure any later step may be there without an earlier one that was not
    forced to the disk: contents (fsync), name (rename), the directory that holds the name (fsync), and only then, by
    the caller, the row that says the file is there. A row therefore never lacks its file; a file that lacks its row is
    swept at the next start.

    Args:
        directory: of files.
        id: its name.
    """

    def __init__(self, directory: Path, id: str) -> None:
        self.id, self.size = id, 0
        self._directory, self._partial = directory, directory / f"{id}.partial"
        with writing(self._partial):
            descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._stream = os.fdopen(descriptor, "wb", buffering=1 << 20)

    def write(self, data: bytes) -> None:
        """Add to it.

        Raises:
            MachineError: there is no room.
        """
        with writing(self._partial):
            self._stream.write(data)
        self.size += len(data)

    def publish(self) -> None:
        """Give it its name.

        Raises:
            MachineError: there is no room.
        """
        with writing(self._partial):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._partial.rename(self._directory / self.id)
            directory = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def discard(self) -> None:
        """Remove what there is of it, named or not."""
        with suppress(OSError):  # what was buffered has no room, and is not wanted any more
            self._stream.close()
        self._partial.unlink(missing_ok=True)
        (self._directory / self.id).unlink(missing_ok=True)
