"""The files of a compiled model: the graph, its weights beside it, and what a session must know of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from optkit.errors import DamagedError

__all__ = ["GRAPH", "WEIGHTS", "Facts"]

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
FACTS = "session.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Facts:
    """What `open` needs besides the graph."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_length: int
    """Positions in the table of rotary angles."""

    def write(self, directory: Path) -> None:
        """Write the facts, and the sizes of the other files as they are now."""
        sizes = {name: (directory / name).stat().st_size for name in (GRAPH, WEIGHTS)}
        record = {"format": FORMAT, "sizes": sizes, "facts": asdict(self)}
        (directory / FACTS).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The facts of a compiled model.

        Raises:
            DamagedError: a file is missing, cut short, or of another format.
        """
        path = directory / FACTS
        try:
            record = json.loads(path.read_text())
            if record["format"] != FORMAT:
                raise DamagedError(
                    "unknown format", where=str(path), found=record["format"], remedy=f"this optkit reads {FORMAT}"
                )
            facts, sizes = cls(**record["facts"]), dict(record["sizes"])
            found = {name: (directory / name).stat().st_size for name in sizes}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"not a compiled model: {type(error).__name__}: {error}", where=str(path)) from error
        for name, size in sizes.items():
            if found[name] != size:
                # ONNX Runtime maps the weights: reading past the end of a short file would kill the process.
                raise DamagedError(f"must have {size} bytes", where=str(directory / name), found=found[name])
        return facts
