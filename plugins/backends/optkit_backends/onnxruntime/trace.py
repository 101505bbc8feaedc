"""Reads the traces that ONNX Runtime's profiler writes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir

from optkit.steps import KernelTime
from optkit_backends.onnxruntime import kernel_name

__all__ = ["PRODUCTS", "kernel_times"]

# These read some rows of their constants, not all.
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention"})
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv", "ConvInteger"})
PRODUCTS = CONVOLUTIONS | {
    *("Gemm", "MatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearMatMul"),
}
# Of these products, those of integers; MatMulNBits says so itself.
INTEGERS = frozenset({"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul"})
SUFFIX = "_kernel_time"
# Where the optimizer changes the layout of a node, it adds this to its name, or names it after its output.
MOVED, BLOCKED = re.compile(r"_token_\d+$"), "_nchwc"


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
    values = {str(value.name): value for node in nodes.values() for value in node.outputs}
    kernels = (e for e in events if e["cat"] == "Node" and e["name"].endswith(SUFFIX) and e["ts"] >= start)
    return [_time(event, nodes, values) for event in sorted(kernels, key=lambda event: event["ts"])]


def _time(event: dict[str, Any], nodes: dict[str, ir.Node], values: dict[str, ir.Value]) -> KernelTime:
    name, kernel, seconds = event["name"].removesuffix(SUFFIX), event["args"]["op_name"], event["dur"] / 1e6
    name = MOVED.sub("", name)
    if name not in nodes and name.endswith(BLOCKED) and kernel in CONVOLUTIONS:
        name = _convolution(values.get(name.removesuffix(BLOCKED)), event["args"]["input_type_shape"]) or name
    node = nodes.get(name)  # the optimizer makes nodes of its own
    if node is None:
        return KernelTime(name, kernel, seconds)
    integer = kernel in INTEGERS
    if kernel == "MatMulNBits":
        level = node.attributes.get_int("accuracy_level", 0)
        kernel, integer = kernel_name(node.attributes.get_int("bits", 0), level), level == 4
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    size = 0 if node.op_type in LOOKUPS else sum(constant.nbytes for constant in constants)
    return KernelTime(name, kernel, seconds, size, _operations(node, event["args"]["output_type_shape"]), integer)


def _convolution(output: ir.Value | None, inputs: list[dict[str, list[int]]]) -> str | None:
    """The name of the convolution that gives an output together with what the optimizer fused into it: the nearest one
    before it with such weights, unless two are equally near.
    """
    [weights] = inputs[1].values()
    near = {output} if output is not None else set()
    while near:
        nodes = [node for value in near if (node := value.producer()) is not None]
        found = {node.name for node in nodes if node.op_type in CONVOLUTIONS and _kernel(node) == weights[1:]}
        if found:
            return found.pop() if len(found) == 1 else None
        passed = (node for node in nodes if node.op_type not in CONVOLUTIONS)
        near = {value for node in passed for value in node.inputs if value is not None}
    return None


def _kernel(node: ir.Node) -> list[int]:
    """The shape of a convolution's weights without output channels, which blocks pad."""
    weight = node.inputs[1]
    return [] if weight is None or weight.const_value is None else list(weight.const_value.shape.numpy()[1:])


def _operations(node: ir.Node, outputs: list[dict[str, list[int]]]) -> int:
    """Of a product with weights."""
    shapes = [value.const_value.shape.numpy() for value in node.inputs if value is not None and value.const_value]
    weights = [shape for shape in shapes if len(shape) > 1]
    if node.op_type not in PRODUCTS or not weights:
        return 0
    [output] = outputs[0].values()
    if node.op_type == "MatMulNBits":
        each = node.attributes.get_int("K", 0)
    else:
        each = math.prod(weights[0][1:]) if node.op_type in CONVOLUTIONS else math.prod(weights[0]) // output[-1]
    return 2 * math.prod(output) * each
