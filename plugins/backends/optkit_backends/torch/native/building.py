"""The kernels as a library: built at first use by torch's loader of extensions, and kept in optkit's cache."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import sys
import sysconfig
from ctypes import POINTER, c_int, c_int64, c_void_p
from pathlib import Path

from optkit.errors import MachineError
from optkit.locations import cache_root
from optkit_backends.torch.native.layout import Instructions, Linear, Model, Step

__all__ = ["best_instructions", "library", "missing"]

_SOURCES = Path(__file__).with_name("csrc")
# Without what changes no result but which of two neighbours a float is: errno of math functions, floating-point traps,
# and products fused with sums wherever a compiler likes (see `fused` in vectors.inc).
_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]
_LINKING = ["-pthread"]


def missing() -> str | None:
    """What must be installed so that the kernels can be built, or None. Imports nothing heavy."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"needs a C++ compiler, and there is no {compiler}; install it, set CXX to one, or take kernels: eager"
    if shutil.which("ninja", path=_path()) is None:
        return "needs ninja to build; pip install 'optkit[native]', or take kernels: eager"
    return None


def _path() -> str:
    # Scripts of an environment that was not activated are on no path.
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


@functools.cache
def library() -> ctypes.CDLL:
    """The functions of `csrc/api.cpp`. Builds them if need be, which takes half a minute.

    Raises:
        MachineError: they cannot be built.
    """
    found = ctypes.CDLL(_built())
    for function, result, arguments in (
        ("optkit_instructions", c_int, []),
        ("optkit_open", c_void_p, [POINTER(Model), c_int, c_int]),
        ("optkit_close", None, [c_void_p]),
        ("optkit_step", c_int, [c_void_p, POINTER(Step)]),
        ("optkit_product", c_int, [POINTER(Linear), c_void_p, c_int64, c_void_p, c_int]),
    ):
        getattr(found, function).restype, getattr(found, function).argtypes = result, arguments
    return found


def best_instructions() -> Instructions:
    """The best that this processor and its operating system have."""
    return Instructions(library().optkit_instructions())


def _built() -> str:
    """The library's file."""
    import torch
    from filelock import FileLock
    from torch.utils import cpp_extension

    folder = cache_root() / "native" / torch.__version__
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = _path()
    try:
        # The loader's own lock is a file that a killed process leaves behind, and that others then wait for.
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            (folder / "lock").unlink(missing_ok=True)
            file: str = cpp_extension.load(
                "optkit_native",
                [str(source) for source in sorted(_SOURCES.glob("*.cpp"))],
                extra_cflags=_FLAGS,
                extra_ldflags=_LINKING,
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        raise MachineError(
            "the kernels cannot be built",
            where=str(folder),
            found=str(error).splitlines()[-1],
            remedy="take kernels: eager",
        ) from error
    finally:
        os.environ["PATH"] = before
    return file
