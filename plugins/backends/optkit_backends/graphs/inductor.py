"""Inductor, PyTorch's compiler of graphs: what it needs of this machine, and where it keeps what it makes."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "COMPILING_BYTES",
    "OPTIONS",
    "compiler_missing",
    "headers_missing",
    "keeping_in",
    "quiet",
    "sizes_of_any_kind",
]

OPTIONS = {"cpp.enable_kernel_profile": True, "cpp.dynamic_threads": True}
"""A profiler sees the kernels that inductor writes, which costs nothing where none looks; and the number of threads is
that of the process that runs them."""
COMPILING_BYTES = 512 << 20
"""What inductor and the C++ compilers that it starts take beside the weights, whatever the model; about."""
_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compiler_missing() -> str | None:
    """What to install so that inductor finds a C++ compiler, or None where it does. Imports nothing heavy."""
    # As torch._inductor.config.cpp.cxx has it.
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name):
        return None
    return f"needs a C++ compiler, and there is no {name}; install it, or set CXX to one"


def headers_missing() -> str | None:
    """What to install so that Python can call what inductor compiles, or None where it can. Imports nothing heavy."""
    folder = Path(sysconfig.get_path("include", scheme="posix_prefix"))
    # A framework of macOS has them elsewhere, and always.
    if sys.platform == "darwin" or (folder / "Python.h").is_file():
        return None
    return f"needs Python's headers, and there is no Python.h in {folder}; install the package python3-dev or its like"


@contextmanager
def keeping_in(directory: Path) -> Iterator[None]:
    """Lets inductor keep its files in a directory, and not in the one that the user's temporary files share."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


@contextmanager
def sizes_of_any_kind() -> Iterator[None]:
    """Lets the sizes of a graph be 1 as well, where tracing would otherwise take it for a case of its own."""
    from torch.fx.experimental import _config

    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]  # made at run time
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, which are of torch's own modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
