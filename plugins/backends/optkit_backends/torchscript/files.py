"""The files of a compiled model: the archive, and what a session must know of it; and how archives are read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from optkit.errors import DamagedError
from optkit_backends.recorded import Recorded

__all__ = ["ARCHIVE", "DecoderFacts", "TensorFacts", "load", "quiet", "running"]

ARCHIVE = "model.pt"


class _Recorded(Recorded):
    FORMAT: ClassVar[int] = 1
    FILES: ClassVar[tuple[str, ...]] = (ARCHIVE,)


@dataclass(frozen=True, slots=True)
class DecoderFacts(_Recorded):
    """What `open` needs of a decoder besides the archive."""

    FILE: ClassVar[str] = "session.json"

    torch: str
    """The version that wrote the archive."""
    layers: list[tuple[int, int, int, str]]
    """Heads, numbers of a key, numbers of a value, and their dtype, of what each layer keeps."""
    windows: list[int | None]
    """The different windows of its layers, in the order of the masks."""
    linears: list[tuple[str, int]]
    """Paths of the linear layers and bytes of their weights, in the order in which they run."""
    vocab_size: int
    longest: int | None
    """Tokens beyond which rotary angles would not be those of the archive."""


@dataclass(frozen=True, slots=True)
class TensorFacts(_Recorded):
    """What `open` needs of any other model besides the archive."""

    FILE: ClassVar[str] = "tensors.json"

    torch: str
    """The version that wrote the archive."""
    inputs: dict[str, tuple[str, list[int | None]]]
    """By name, dtype and shape."""
    outputs: dict[str, tuple[str, list[int | None]]]
    """Likewise, in the order in which they come."""


def load(directory: Path, written_by: str) -> Any:
    """The module of an archive that this version of torch, or `written_by`, wrote.

    Raises:
        DamagedError: torch cannot read it.
    """
    file = directory / ARCHIVE
    try:
        with quiet():
            return torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]  # torch's own
    except Exception as error:  # of several kinds, by what is broken
        reason = str(error).strip().partition("\n")[0]
        raise DamagedError(
            f"torch {torch.__version__} cannot load it: {reason}",
            where=str(file),
            remedy=f"compile it again, or use torch {written_by}, which wrote it",
        ) from error


@contextmanager
def running() -> Iterator[None]:
    """Runs archives as they are frozen. What torch.jit would do to them at their second run takes 5 s for
    SmolLM2-135M's, and gains nothing: the operators are the same.
    """
    with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # not in its __all__
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: that TorchScript is deprecated, which this backend's documentation says; what tracing may get
    wrong, which compiling checks by running the result; and those of attributes, all of which tracing reads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
