"""Reads the traces that ONNX Runtime's profiler writes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir

from optkit.steps import KernelTime
from optkit_backends.onnxruntime import kernel_name

__all__ = ["kernel_times"]

# These read some rows of their constants, not all.
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention"})
SUFFIX = "_kernel_time"


def kernel_times(trace: Path, graph: Path, runs: int) -> list[KernelTime]:
    """The kernels of the last `runs` runs of a trace, in order of execution.

    Args:
        trace: the profiler's JSON file.
        graph: the model that ran, for the sizes of its weights.
        runs: how many runs of the graph to read.
    """
    events = json.loads(trace.read_text())
    start = sorted(event["ts"] for event in events if event["name"] == "model_run")[-runs]
    nodes = {str(node.name): node for node in ir.load(graph).graph}
    kernels = (e for e in events if e["cat"] == "Node" and e["name"].endswith(SUFFIX) and e["ts"] >= start)
    return [
        _time(event["name"].removesuffix(SUFFIX), event["args"]["op_name"], event["dur"] / 1e6, nodes)
        for event in sorted(kernels, key=lambda event: event["ts"])
    ]


def _time(name: str, kernel: str, seconds: float, nodes: dict[str, ir.Node]) -> KernelTime:
    node = nodes.get(name)  # the optimizer makes nodes of its own
    if node is None:
        return KernelTime(name, kernel, seconds)
    if kernel == "MatMulNBits":
        kernel = kernel_name(node.attributes.get_int("bits", 0), node.attributes.get_int("accuracy_level", 0))
    constants = [value.const_value for value in node.inputs if value is not None]
    size = sum(constant.nbytes for constant in constants if constant is not None)
    return KernelTime(name, kernel, seconds, 0 if node.op_type in LOOKUPS else size)
