"""The files of a compiled model: the graph, its weights beside it, and what a session must know of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

from optkit.errors import DamagedError

__all__ = ["GRAPH", "WEIGHTS", "Facts", "TensorFacts"]

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
FORMAT = 2


class _Recorded:
    """A dataclass that is written beside the files that it tells of."""

    FILE: ClassVar[str]

    def write(self, directory: Path) -> None:
        """Write the facts, and the sizes of the other files as they are now."""
        sizes = {name: (directory / name).stat().st_size for name in (GRAPH, WEIGHTS)}
        record = {"format": FORMAT, "sizes": sizes, "facts": asdict(self)}  # type: ignore[call-overload]
        (directory / self.FILE).write_text(json.dumps(record, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The facts of a compiled model.

        Raises:
            DamagedError: a file is missing, cut short, or of another format.
        """
        path = directory / cls.FILE
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


@dataclass(frozen=True, slots=True)
class Facts(_Recorded):
    """What `open` needs of a decoder besides the graph."""

    FILE: ClassVar[str] = "session.json"

    kv_heads: list[int]
    """Of each layer."""
    head_dim: int
    vocab_size: int
    max_length: int
    """Positions in the table of rotary angles."""
    cache_dtype: Literal["float32", "int8"] = "float32"
    """Of keys and values."""


@dataclass(frozen=True, slots=True)
class TensorFacts(_Recorded):
    """What `open` needs of any other model besides the graph."""

    FILE: ClassVar[str] = "tensors.json"

    inputs: list[str]
    outputs: list[str]
