"""What a session must know of compiled files: written beside them, with their sizes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Self

from optkit.errors import DamagedError

__all__ = ["Recorded"]


class Recorded:
    """A dataclass of facts that is a JSON file beside the files that it tells of.

    Attributes:
        FORMAT: of the facts and the files; another one is refused.
        FILE: the name of the JSON file.
        FILES: the names of the others.
    """

    FORMAT: ClassVar[int]
    FILE: ClassVar[str]
    FILES: ClassVar[tuple[str, ...]]

    def write(self, directory: Path) -> None:
        """Write the facts, and the sizes of the other files as they are now."""
        sizes = {name: (directory / name).stat().st_size for name in self.FILES}
        record = {"format": self.FORMAT, "sizes": sizes, "facts": asdict(self)}  # type: ignore[call-overload]
        (directory / self.FILE).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The facts of compiled files.

        Raises:
            DamagedError: a file is missing, cut short, or of another format.
        """
        path = directory / cls.FILE
        try:
            record = json.loads(path.read_text())
            if record["format"] != cls.FORMAT:
                raise DamagedError(
                    "unknown format", where=str(path), found=record["format"], remedy=f"this optkit reads {cls.FORMAT}"
                )
            facts, sizes = cls(**record["facts"]), dict(record["sizes"])
            found = {name: (directory / name).stat().st_size for name in sizes}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"not a compiled model: {type(error).__name__}: {error}", where=str(path)) from error
        for name, size in sizes.items():
            if found[name] != size:
                # Runtimes map large files: reading past the end of a short one would kill the process.
                raise DamagedError(f"must have {size} bytes", where=str(directory / name), found=found[name])
        return facts
