"""The files of a compiled model: the archive, and what a session must know of it; and how archives are read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from optkit.errors import DamagedError
from optkit_backends.graphs.facts import DecoderFacts, TensorFacts
from optkit_backends.graphs.timing import Profiled

__all__ = ["ARCHIVE", "PROFILED", "ArchivedDecoder", "ArchivedTensors", "load", "quiet", "running"]

PROFILED = Profiled(("aten::",), frozenset({"aten::linear", "aten::_convolution"}))
"""What torch's profiler calls what runs."""

ARCHIVE = "model.pt"


class ArchivedDecoder(DecoderFacts):
    """Of the archive of a decoder."""

    FORMAT: ClassVar[int] = 3
    FILES: ClassVar[tuple[str, ...]] = (ARCHIVE,)


class ArchivedTensors(TensorFacts):
    """Of the archive of any other model."""

    FORMAT: ClassVar[int] = 3
    FILES: ClassVar[tuple[str, ...]] = (ARCHIVE,)


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
