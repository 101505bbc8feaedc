"""The most that this machine can do: memory bandwidth and matrix products, measured once and kept.

The yardstick of `optkit explain`: a kernel is judged by how near it comes to these, not by how fast it looks (method:
Williams et al., Roofline, doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

from pydantic import Field, ValidationError

from optkit.errors import MachineError
from optkit.hardware.facts import machine, memory, usable_cores
from optkit.locations import cache_root
from optkit.options import Options

__all__ = ["Peaks", "measure", "peaks", "quick_gflops"]

Progress = Callable[[int, int, str], None]
SECONDS = 1.0
"""How long each ceiling is tried for."""
SIZES = (512, 1024, 2048, 4096)
"""Sides of the square matrices. Large processors need large ones; slow processors stop early."""
METHOD = 2
"""Goes up when a figure comes to be measured in another way, so that the kept ones are measured again."""


class Peaks(Options):
    """Measured ceilings of this machine, all usable cores together, each the best of many runs. 1 GB is 10^9 bytes."""

    read_gb_per_s: float = Field(gt=0)
    """Main memory read by a sum over arrays far larger than the caches; the bytes read count."""
    copy_gb_per_s: float = Field(gt=0)
    """Main memory copied; the bytes read and the bytes written count."""
    fp32_gflops: float | None = Field(gt=0)
    """`torch.mm` of square float32 matrices; a product and a sum are two operations."""
    bf16_gflops: float | None = Field(gt=0)
    """`torch.mm` of square bfloat16 matrices. Without bf16 instructions this is torch's emulation."""
    int8_gops: float | None = Field(gt=0)
    """Products of square int8 matrices: `torch._int_mm`, which is a plain loop without VNNI, or oneDNN's linear layer,
    which Inductor calls; whichever is faster."""
    unsupported: dict[str, str]
    """For each figure that is None, what torch said."""
    cores: int = Field(ge=1)
    """Threads that measured."""
    torch: str
    """The torch version that measured."""

    def least_seconds(self, read: float, operations: float, integer_operations: float = 0.0) -> float:
        """What work takes that is as fast as this machine: reading memory or computing, whichever takes longer.

        Args:
            read: bytes from main memory.
            operations: in float32, multiplications and additions.
            integer_operations: likewise, of int8. A figure that could not be measured bounds nothing.
        """
        computed = sum(
            count / rate
            for count, rate in ((operations, self.fp32_gflops), (integer_operations, self.int8_gops))
            if rate
        )
        return max(read / self.read_gb_per_s, computed) / 1e9


def peaks(cached_only: bool = True) -> Peaks | None:
    """The ceilings measured on this machine with this torch, or None if there are none yet.

    Args:
        cached_only: False measures what is missing, without showing progress.
    """
    with suppress(OSError, ValidationError):  # absent, or damaged: measured again either way
        return Peaks.model_validate_json(_file().read_bytes())
    return None if cached_only else measure(lambda *_: None)


def measure(progress: Progress) -> Peaks:
    """Measure all ceilings, in under ten seconds, and keep them in the cache. Needs the machine to itself.

    Args:
        progress: called as `progress(done, total, what)` before each measurement.

    Raises:
        MachineError: the cache folder cannot be written, or a gigabyte of memory is not free.
    """
    file = _file()
    _writable(file.parent)
    cores = usable_cores()
    progress(0, 4, "memory bandwidth")
    read, copy = _bandwidth(cores)
    found: dict[str, float | None] = {}
    unsupported = {}
    for done, (figure, dtype) in enumerate(
        [("fp32_gflops", "float32"), ("bf16_gflops", "bfloat16"), ("int8_gops", "int8")], start=1
    ):
        progress(done, 4, f"{dtype} matrix product")
        try:
            found[figure] = _products(dtype, cores)
        except RuntimeError as error:  # torch has no such kernel for this processor
            found[figure] = None
            unsupported[figure] = " ".join(str(error).split())
    progress(4, 4, "done")
    result = Peaks(
        read_gb_per_s=read, copy_gb_per_s=copy, **found, unsupported=unsupported, cores=cores, torch=_torch_version()
    )
    _write(file, result.model_dump_json(indent=2) + "\n")
    return result


def quick_gflops() -> float:
    """What numpy's float32 matrix product reaches in a tenth of a second, in GFLOP/s; for estimates only."""
    import numpy as np

    side = 512
    matrix = np.ones((side, side), np.float32)
    return 2 * side**3 / _best(lambda: np.matmul(matrix, matrix), 0.1) / 1e9


def _bandwidth(cores: int) -> tuple[float, float]:
    """Read and copy, in GB/s."""
    import numpy as np

    size = 256 * 2**20 * (1 if cores <= 8 else 2)  # far beyond the last cache, also of large processors
    if memory().available < 3 * size:
        found = f"{memory().available >> 20} MiB"
        raise MachineError(f"measuring bandwidth needs {3 * size >> 20} MiB of free memory", found=found)
    source, target = np.ones(size // 8), np.zeros(size // 8)
    parts, copies = np.array_split(source, cores), np.array_split(target, cores)
    with ThreadPoolExecutor(cores) as threads:  # numpy lets go of the interpreter's lock in both
        read = _best(lambda: list(threads.map(np.sum, parts)), SECONDS)
        copy = _best(lambda: list(threads.map(np.copyto, copies, parts)), SECONDS)
    return size / read / 1e9, 2 * size / copy / 1e9


def _products(dtype: str, cores: int) -> float:
    """Operations of square matrix products, in 10^9 a second.

    Raises:
        RuntimeError: torch has no kernel for them.
    """
    makers = (_integer_product, _integer_linear) if dtype == "int8" else (partial(_float_product, dtype),)
    found, refusals = [], []
    with _threads(cores):
        for make in makers:
            try:
                found.append(_product(make, SECONDS / len(makers)))
            except RuntimeError as error:
                refusals.append(error)
    if not found:
        raise refusals[0]
    return max(found)


def _product(make: Callable[[int], Callable[[], object]], seconds: float) -> float:
    """Of one kernel, made for a side."""
    best, spent = 0.0, 0.0
    for side in SIZES:
        work = make(side)
        started = time.perf_counter()
        taken = _best(work, seconds / len(SIZES))
        best = max(best, 2 * side**3 / taken / 1e9)
        spent += time.perf_counter() - started
        if spent + 8 * taken > 2 * seconds:  # the next size takes eight times as long
            break
    return best


def _float_product(dtype: str, side: int) -> Callable[[], object]:
    import torch

    matrix = torch.ones(side, side, dtype=getattr(torch, dtype))
    return partial(torch.mm, matrix, matrix)


def _integer_product(side: int) -> Callable[[], object]:
    import torch

    matrix = torch.ones(side, side, dtype=torch.int8)
    return partial(torch._int_mm, matrix, matrix)


def _integer_linear(side: int) -> Callable[[], object]:
    import torch

    weight, given = torch.ones(side, side, dtype=torch.int8), torch.ones(side, side, dtype=torch.uint8)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
    except AttributeError as error:  # a torch without oneDNN
        raise RuntimeError(str(error)) from error
    scale, zero = torch.ones(side), torch.zeros(side, dtype=torch.int32)
    # No bias; scale, zero point and type of the output; no activation.
    after: tuple[object, ...] = (None, 1.0, 0, torch.uint8, "none", [], "")
    return partial(torch.ops.onednn.qlinear_pointwise, given, 1.0, 0, packed, scale, zero, *after)


def _best(work: Callable[[], object], seconds: float) -> float:
    """The shortest of at least two runs, in seconds; the first one warms up and counts like any other."""
    best, runs = float("inf"), 0
    end = time.perf_counter() + seconds
    while runs < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best, runs = min(best, time.perf_counter() - started), runs + 1
    return best


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _file() -> Path:
    key = hashlib.sha256(f"{machine().fingerprint()} torch {_torch_version()} {METHOD}".encode()).hexdigest()[:16]
    return cache_root() / "peaks" / f"{key}.json"


def _torch_version() -> str:
    return importlib.metadata.version("torch")


def _writable(folder: Path) -> None:
    """Refuse before the measurement what would fail after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error.strerror) from error
    if not os.access(folder, os.W_OK):
        raise _unwritable(folder, "permission denied")


def _write(file: Path, text: str) -> None:
    try:
        with NamedTemporaryFile("w", dir=file.parent, prefix=".peaks-", delete=False) as temporary:
            temporary.write(text)
        Path(temporary.name).replace(file)
    except OSError as error:
        raise _unwritable(file.parent, error.strerror) from error


def _unwritable(folder: Path, reason: str | None) -> MachineError:
    return MachineError(
        f"cannot write the cache folder ({reason})",
        where=str(folder),
        remedy="set OPTKIT_CACHE to one that you can write",
    )
