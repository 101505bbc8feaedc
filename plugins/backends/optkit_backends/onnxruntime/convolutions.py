"""Convolutions of static int8 activations, as the operator that what follows them allows.

QLinearConv gives integers, so it stands where the next layer rounds what the convolution gives, at most after a ReLU,
max pooling and changes of shape, which work on integers as well. Elsewhere the sums of ConvInteger become floats.
A batch norm after a convolution becomes part of its scales and bias, so that it is in nobody's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["UNSETTLED", "settle"]

UNSETTLED = "optkit"
"""Domain of the node `Conv` that waits for its operator.

Its inputs are the first six of QLinearConv, then the float bias, if there is one.
"""
# They move numbers, or choose the largest, which rounding does not change.
INDIFFERENT = frozenset({"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# QLinearConv adds an int32 bias to int32 sums of products, which are small next to this.
LARGEST_BIAS = 2**30


def settle(graph: ir.Graph) -> None:
    """Give every waiting convolution of `graph` its operator."""
    for node in list(graph):
        if node.domain == UNSETTLED:
            _take_in_norm(graph, node)
            followers = _followers(node)
            bias = _integer_bias(node)
            if followers is None or bias is None:
                _as_floats(graph, node)
            else:
                _as_integers(graph, node, bias, followers)
    graph.opset_imports.pop(UNSETTLED, None)


def _take_in_norm(graph: ir.Graph, node: ir.Node) -> None:
    """Multiply the scales of a convolution by those of a batch norm that alone reads it, and shift its bias as well."""
    value = node.outputs[0]
    norm = next((use.node for use in value.uses()), None)
    if value.is_graph_output() or len(value.uses()) != 1 or norm is None or norm.op_type != "BatchNormalization":
        return
    gamma, beta, mean, variance = (_constant(norm, index).astype(np.float64) for index in range(1, 5))
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    bias = _constant(node, 6) if len(node.inputs) > 6 else 0.0
    arrays = {4: _constant(node, 4) * factor, 6: (bias - mean) * factor + beta}
    node.resize_inputs(7)
    for index, array in arrays.items():
        node.replace_input_with(index, _initializer(graph, f"{node.name}.norm_{index}", array.astype(np.float32)))
    output = norm.outputs[0]
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    value.name = output.name


def _followers(node: ir.Node) -> list[ir.Node] | None:
    """What lies between a convolution and the QuantizeLinear after it, that one included; None where there is none."""
    followers: list[ir.Node] = []
    value = node.outputs[0]
    while not value.is_graph_output() and len(value.uses()) == 1:
        [use] = value.uses()
        followers.append(use.node)
        if use.node.op_type == "QuantizeLinear":
            return followers
        relu = use.node.op_type == "Relu"
        if use.idx != 0 or len(use.node.outputs) != 1 or not (relu or use.node.op_type in INDIFFERENT):
            return None
        value = use.node.outputs[0]
    return None


def _integer_bias(node: ir.Node) -> npt.NDArray[np.int32] | None:
    """The bias in steps of the sums that it is added to; None where int32 does not hold it, or a scale is no step."""
    scale = _constant(node, 1).astype(np.float64) * _constant(node, 4).astype(np.float64)
    if scale.min() <= 0:
        return None
    bias = np.round(_constant(node, 6) / scale) if len(node.inputs) > 6 else np.zeros_like(scale)
    return bias.astype(np.int32) if np.abs(bias).max() < LARGEST_BIAS else None


def _as_integers(graph: ir.Graph, node: ir.Node, bias: npt.NDArray[np.int32], followers: Sequence[ir.Node]) -> None:
    """QLinearConv, whose output the followers take as integers; the last of them, which would round it, goes."""
    rounding = followers[-1]
    grid = list(rounding.inputs[1:3])
    operands = [*node.inputs[:6], *grid, _initializer(graph, f"{node.name}.bias", bias)]
    value = _put(graph, node, "QLinearConv", operands, node.attributes.values())
    for follower in followers[:-1]:
        if follower.op_type == "Relu":
            if _constant(rounding, 2):  # nothing is below a zero point of 0
                value = _put(graph, follower, "Clip", [value, grid[1]])
        else:
            value = _put(graph, follower, follower.op_type, [value, *follower.inputs[1:]], follower.attributes.values())
    rounding.outputs[0].replace_all_uses_with(value)
    graph.remove([node, *followers], safe=False)


def _as_floats(graph: ir.Graph, node: ir.Node) -> None:
    """ConvInteger, and its sums times their scale."""
    input, _, input_zero_point, weight, _, zero_point = node.inputs[:6]
    sums = _put(graph, node, "ConvInteger", [input, weight, input_zero_point, zero_point], node.attributes.values())
    floats = _put(graph, node, "Cast", [sums], [ir.AttrInt64("to", ir.DataType.FLOAT)])
    product = (_constant(node, 1) * _constant(node, 4))[:, None, None]
    value = _put(graph, node, "Mul", [floats, _initializer(graph, f"{node.name}.scale", product)])
    if len(node.inputs) > 6:
        bias = _initializer(graph, f"{node.name}.bias", _constant(node, 6)[:, None, None])
        value = _put(graph, node, "Add", [value, bias])
    output = node.outputs[0]
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    value.name, value.type, value.shape = output.name, output.type, output.shape
    graph.remove(node, safe=True)


def _put(
    graph: ir.Graph, before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], attributes: Any = ()
) -> ir.Value:
    """A new operator, where `before` stands."""
    metadata = dict(before.metadata_props)  # where it comes from
    node = ir.Node("", kind, inputs, list(attributes), name=f"{before.name}.{kind}", metadata_props=metadata)
    node.outputs[0].name = node.name
    graph.insert_before(before, node)
    return node.outputs[0]


def _constant(node: ir.Node, index: int) -> npt.NDArray[np.float32]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    array: npt.NDArray[np.float32] = value.const_value.numpy()
    return array


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
