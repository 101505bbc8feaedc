"""What this machine is, and the most that it can do: facts read in milliseconds, ceilings measured in seconds."""

from optkit.hardware.ceilings import Peaks, measure, peaks, quick_gflops
from optkit.hardware.facts import (
    Device,
    Machine,
    Memory,
    accelerator,
    cpu_name,
    devices,
    exact_byte_products,
    isa,
    libraries,
    machine,
    memory,
    usable_cores,
)
from optkit.hardware.heap import keep_freed_memory

__all__ = [
    "Device",
    "Machine",
    "Memory",
    "Peaks",
    "accelerator",
    "cpu_name",
    "devices",
    "exact_byte_products",
    "isa",
    "keep_freed_memory",
    "libraries",
    "machine",
    "measure",
    "memory",
    "peaks",
    "quick_gflops",
    "usable_cores",
]
