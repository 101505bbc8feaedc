"""Weights of integer products with the sign that the processor at hand multiplies fastest.

They are compiled unsigned: where a processor has no VNNI, the kernels of ONNX Runtime for unsigned by signed numbers
saturate. Where it has, those are exact, and much faster than the ones for unsigned weights. The numbers are the same,
since stored integers and their zero points both become 128 less.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import uses_external_data
from onnx.numpy_helper import from_array, to_array

__all__ = ["with_signed_weights"]

# By operator, where its weights and their zero points stand. ConvInteger takes no signed weights.
OPERANDS = {"MatMulIntegerToFloat": (1, 5), "QLinearConv": (3, 5)}
SIGNED = ".signed"


def with_signed_weights(graph: Path) -> tuple[bytes, dict[str, npt.NDArray[np.int8]]] | None:
    """A graph whose integer products read signed weights.

    Args:
        graph: the file, with its weights beside it.

    Returns:
        The graph, and by name what to take in the place of weights in its other file; None if no product of the graph
        reads unsigned weights. Weights that a ConvInteger reads as well stay as they are.
    """
    model = onnx.load(graph, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights, zero_points = set[str](), set[str]()
    elsewhere = {name for node in model.graph.node if node.op_type not in OPERANDS for name in node.input}
    for node in model.graph.node:
        if node.op_type in OPERANDS:
            weight, zero_point = OPERANDS[node.op_type]
            name = node.input[weight]
            if stored[name].data_type == onnx.TensorProto.UINT8 and name not in elsewhere:
                weights.add(name)
                zero_points.add(node.input[zero_point])
                # Another one, since activations may share theirs.
                node.input[zero_point] += SIGNED
    given: dict[str, npt.NDArray[np.int8]] = {}
    for name in weights:
        numbers, tensor = _signed(stored[name], graph.parent), stored[name]
        if uses_external_data(tensor):
            tensor.data_type, given[name] = onnx.TensorProto.INT8, numbers
        else:
            tensor.CopyFrom(from_array(numbers, name))
    model.graph.initializer.extend(
        from_array(_signed(stored[name], graph.parent), name + SIGNED) for name in zero_points
    )
    return (model.SerializeToString(), given) if weights else None


def _signed(tensor: onnx.TensorProto, folder: Path) -> npt.NDArray[np.int8]:
    return (to_array(tensor, str(folder)) ^ np.uint8(0x80)).view(np.int8)
