"""The files of a compiled model: the package, and what a session must know of it; and how packages are read."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from optkit import hardware
from optkit.errors import DamagedError, MachineError
from optkit_backends.graphs.facts import DecoderFacts, TensorFacts
from optkit_backends.graphs.inductor import quiet
from optkit_backends.graphs.timing import Profiled

__all__ = ["PACKAGE", "PROFILED", "PackagedDecoder", "PackagedTensors", "load", "made_here"]

PROFILED = Profiled(
    ("aoti_torch_cpu_", "graph_"),
    frozenset({"aoti_torch_cpu_mm_out", "aoti_torch_cpu_addmm_out", "aoti_torch_cpu_convolution"}),
)
"""What torch's profiler calls what runs."""

PACKAGE = "model.pt2"


@dataclass(frozen=True, slots=True)
class PackagedDecoder(DecoderFacts):
    """Of the package of a decoder."""

    FORMAT: ClassVar[int] = 2
    FILES: ClassVar[tuple[str, ...]] = (PACKAGE,)

    processor: str
    """The architecture that the package is machine code for."""
    isa: list[str]
    """The vector extensions that the code may use: those of the machine that compiled it."""


@dataclass(frozen=True, slots=True)
class PackagedTensors(TensorFacts):
    """Of the package of any other model."""

    FORMAT: ClassVar[int] = 3
    FILES: ClassVar[tuple[str, ...]] = (PACKAGE,)

    processor: str
    isa: list[str]


def made_here() -> dict[str, Any]:
    """What facts say of the machine that compiles."""
    return {"processor": platform.machine(), "isa": list(hardware.isa())}


def load(directory: Path, facts: PackagedDecoder | PackagedTensors) -> Any:
    """The function of a package. It needs no C++ compiler.

    Raises:
        MachineError: another version of torch made it, or for another processor.
        DamagedError: torch cannot read it.
    """
    file = directory / PACKAGE
    if facts.torch != torch.__version__:
        raise MachineError(
            f"torch {facts.torch} compiled it, and its machine code runs on no other version",
            where=str(file),
            found=torch.__version__,
            remedy="compile it again, or install that version",
        )
    needed, here = [facts.processor, *facts.isa], [platform.machine(), *hardware.isa()]
    missing = [name for name in needed if name not in here]
    if missing:
        raise MachineError(
            f"compiled for {' '.join(needed)}, and this processor has no {', '.join(missing)}",
            where=str(file),
            found=" ".join(here),
            remedy="compile it again here",
        )
    try:
        with quiet():
            return torch._inductor.aoti_load_package(str(file))
    except Exception as error:  # of several kinds, by what is broken
        reason = str(error).strip().partition("\n")[0]
        raise DamagedError(
            f"torch {torch.__version__} cannot load it: {reason}", where=str(file), remedy="compile it again"
        ) from error
