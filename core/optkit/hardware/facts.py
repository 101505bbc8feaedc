"""What this machine is. Nothing here imports a runtime, and only `devices` starts a process."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optkit.hardware.cgroups import cpu_quota, memory_limits

__all__ = [
    "Device",
    "Machine",
    "Memory",
    "accelerator",
    "cpu_name",
    "devices",
    "exact_byte_products",
    "isa",
    "libraries",
    "machine",
    "memory",
    "usable_cores",
]

# As the kernel spells them -> as the field does, in the order in which they are shown.
EXTENSIONS = {
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "neon",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
EXACT = frozenset({"avx_vnni", "avx512_vnni", "amx_int8"})
LIBRARIES = (
    "accelerate",
    "compressed-tensors",
    "gguf",
    "huggingface_hub",
    "llama-cpp-python",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "openvino-genai",
    "optkit",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
)


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory that this process may use, in bytes, control groups counted."""

    total: int
    available: int
    """What new allocations can take without swapping."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU."""

    name: str
    memory: int | None
    """Bytes, or None where the driver does not say."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts that a measurement must carry to mean anything."""

    cpu: str
    architecture: str
    cores: int
    isa: tuple[str, ...]
    memory: Memory
    devices: tuple[Device, ...]
    system: str
    python: str
    libraries: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """Everything but the libraries as JSON data, in the names of these fields, for manifests and reports."""
        return {name: value for name, value in asdict(self).items() if name != "libraries"}

    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal over the hardware: the same after a reboot or an upgrade of any software."""
        gib = round(self.memory.total / 2**30)  # kernels reserve a little more or less
        hardware = [self.cpu, self.architecture, self.cores, self.isa, gib, [asdict(device) for device in self.devices]]
        return hashlib.sha256(json.dumps(hardware).encode()).hexdigest()


def machine() -> Machine:
    """This machine, now."""
    return Machine(
        cpu=cpu_name(),
        architecture=platform.machine(),
        cores=usable_cores(),
        isa=isa(),
        memory=memory(),
        devices=devices(),
        system=platform.platform(),
        python=platform.python_version(),
        libraries=libraries(),
    )


def usable_cores() -> int:
    """Cores that this process may use, at least 1: its affinity, cut by the CPU quota of its control groups."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, allowed if math.isinf(quota) else min(allowed, math.ceil(quota)))


def memory() -> Memory:
    """Memory that this process may use."""
    import psutil

    system = psutil.virtual_memory()
    limits = list(memory_limits())
    return Memory(
        total=min([system.total, *(group.limit for group in limits)]),
        available=min([system.available, *(max(0, group.limit - group.used) for group in limits)]),
    )


def isa(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Vector extensions that matter to inference, for example `avx512_vnni`; empty where the system hides them.

    Args:
        cpuinfo: the kernel's description of the processors.
    """
    facts = _first_processor(cpuinfo)
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    if not flags and platform.machine() in ("arm64", "aarch64"):
        flags = {"asimd"}  # part of the base architecture
    return tuple(dict.fromkeys(name for flag, name in EXTENSIONS.items() if flag in flags))


def exact_byte_products() -> bool:
    """Whether x86 instructions here add products of unsigned and signed bytes in 32 bits, as VNNI and AMX do.

    Those of older processors add two of them in 16 bits, which saturates.
    """
    return not EXACT.isdisjoint(isa())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name, or its architecture where it has none.

    Args:
        cpuinfo: the kernel's description of the processors.
    """
    return _first_processor(cpuinfo).get("model name") or platform.processor() or platform.machine() or "unknown"


@functools.cache
def devices() -> tuple[Device, ...]:
    """The GPUs that NVIDIA's driver shows, found without importing torch; empty if there are none."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            answer = ""  # the tool outlives a driver that was removed; the kernel's own word follows
        if answer.strip():
            return tuple(parse_smi(line) for line in answer.strip().splitlines())
    known = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return tuple(Device(_pairs(file.read_text()).get("Model", "NVIDIA GPU"), None) for file in known)


def accelerator() -> str:
    """Where work on a model's weights runs fastest here, as torch names devices: `cuda`, or `cpu`. Imports torch."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_smi(line: str) -> Device:
    """A GPU from one line `name, MiB` of nvidia-smi, which puts a word in brackets where it does not know."""
    name, _, mebibytes = line.rpartition(",")
    size = mebibytes.strip()
    return Device(name.strip(), int(size) * 2**20 if size.isdecimal() else None)


def libraries() -> dict[str, str]:
    """Versions of the installed libraries that decide speed and numerics, read without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    try:
        return _pairs(cpuinfo.read_text().partition("\n\n")[0])
    except OSError:
        return {}


def _pairs(text: str) -> dict[str, str]:
    split = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in split}
