"""The feature that hides padding from attention, out of the very products that give query and key.

`attention` appends one feature to each head of both, and a graph that says so copies both. A product gives it as well:
as a column of zeros, whose bias is the feature. What each token's key hides is added to the key as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["take_in"]

Array = npt.NDArray[Any]


def take_in(graph: ir.Graph) -> None:
    """Let products give the feature, wherever query and key of an attention come from products alone."""
    masks: dict[tuple[ir.Value, int, int], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "MultiHeadAttention":
            continue
        query, key = (_Joined.before(value) for value in node.inputs[:2])
        padding = None if key is None else _source(_source(key.feature, "Expand"), "Unsqueeze")
        if query is None or key is None or padding is None:
            continue
        heads, scale = node.attributes.get_int("num_heads"), node.attributes.get_float("scale")
        wider = _Widening(graph, heads)
        wide_query, wide_key = wider.widened(query.source, 1 / scale), wider.widened(key.source, 0.0)
        if wide_query is None or wide_key is None:
            continue
        shape = padding, heads, key.size
        if shape not in masks:
            masks[shape] = _spread(graph, node, *shape)
        node.replace_input_with(0, wide_query)
        node.replace_input_with(1, _before(graph, node, "Add", [wide_key, masks[shape]]))


@dataclass(frozen=True, slots=True)
class _Joined:
    """Query or key as `attention` makes it."""

    source: ir.Value
    """`[batch, tokens, heads * size]`, of which nothing else is made."""
    size: int
    """Features of a head."""
    feature: ir.Value
    """What is appended to each head."""

    @classmethod
    def before(cls, value: ir.Value | None) -> _Joined | None:
        """What `value` is made of; None if nothing was appended."""
        concat = _producer(_source(value, "Reshape"), "Concat")
        if concat is None or len(concat.inputs) != 2:
            return None
        heads, feature = concat.inputs
        source = _source(heads, "Reshape")
        if source is None or feature is None or heads is None or heads.shape is None:
            return None
        size = heads.shape[-1]
        return cls(source, size, feature) if isinstance(size, int) else None


def _spread(graph: ir.Graph, node: ir.Node, mask: ir.Value, heads: int, size: int) -> ir.Value:
    """What is added to keys, `[batch, tokens, heads * (size + 1)]`: nothing but to the last feature of each head."""
    last = np.tile(np.arange(size + 1) == size, heads).astype(np.float32)
    axis = _constant(graph, f"{node.name}.axis", np.array([2]))
    column = _before(graph, node, "Unsqueeze", [mask, axis])
    return _before(graph, node, "Mul", [column, _constant(graph, f"{node.name}.last", last)])


class _Widening:
    """Products of a graph, with one more feature for each head."""

    def __init__(self, graph: ir.Graph, heads: int) -> None:
        self._graph, self._heads = graph, heads

    def widened(self, value: ir.Value, feature: float) -> ir.Value | None:
        """What gives `value` with `feature` after those of each head; None if something else than a product does.

        Args:
            value: `[batch, tokens, heads * size]`.
            feature: the same for all tokens.
        """
        node = value.producer()
        if node is None or len(value.uses()) != 1:
            return None
        if node.op_type == "Add":
            return self._sum(node, feature)
        if feature == 0 and node.op_type == "Mul":
            return self._scaled(node)
        if feature == 0 and node.op_type == "MatMul":
            return self._product(node, {1: 0.0})
        if node.op_type == "MatMulIntegerToFloat":
            return self._integers(node, feature)
        return None

    def _sum(self, node: ir.Node, feature: float) -> ir.Value | None:
        for place in (0, 1):
            bias, other = node.inputs[place], node.inputs[1 - place]
            if bias is not None and other is not None and bias.const_value is not None:
                wide = self.widened(other, 0.0)
                return wide and self._put(node, [wide, self._columns(bias, feature)])
        return None

    def _scaled(self, node: ir.Node) -> ir.Value | None:
        """Numbers times a scale for each token."""
        product, scale = node.inputs
        if product is None or scale is None or scale.shape is None or scale.shape[-1] != 1:
            return None
        wide = self.widened(product, 0.0)
        return wide and self._put(node, [wide, scale])

    def _integers(self, node: ir.Node, feature: float) -> ir.Value | None:
        zero_point, bias = node.inputs[5], node.inputs[6] if len(node.inputs) > 6 else None
        if zero_point is None or zero_point.const_value is None or (bias is None and feature):
            return None
        # A weight that is its zero point stands for 0.
        points = zero_point.const_value.numpy()
        added = {1: float(points.flat[0]), 3: 1.0}
        if points.size > 1:
            added[5] = added[1]
        if bias is not None:
            added[6] = feature
        return self._product(node, added)

    def _product(self, node: ir.Node, added: dict[int, float]) -> ir.Value | None:
        """The node again, with another number after those of each head in some of its constants."""
        inputs = list(node.inputs)
        for place, number in added.items():
            value = inputs[place]
            if value is None or value.const_value is None:
                return None
            inputs[place] = self._columns(value, number)
        return self._put(node, inputs)

    def _columns(self, value: ir.Value, number: float) -> ir.Value:
        assert value.const_value is not None
        array = value.const_value.numpy()
        apart = array.reshape(*array.shape[:-1], self._heads, -1)
        column = np.full((*apart.shape[:-1], 1), number, array.dtype)
        wide = np.concatenate([apart, column], -1).reshape(*array.shape[:-1], -1)
        # Products may share `value` and differ in the rest: equal constants are in a graph once.
        return _constant(self._graph, f"{value.name}.{self._heads}_heads_with_{number!r}", wide)

    def _put(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        name, metadata = f"{node.name}.wide", dict(node.metadata_props)
        attributes = list(node.attributes.values())
        wide = ir.Node(node.domain, node.op_type, inputs, attributes, name=name, metadata_props=metadata)
        wide.outputs[0].name = name
        self._graph.insert_after(node, wide)
        return wide.outputs[0]


def _source(value: ir.Value | None, kind: str) -> ir.Value | None:
    """What an operator of this kind made `value` of."""
    node = _producer(value, kind)
    return None if node is None else node.inputs[0]


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _before(graph: ir.Graph, node: ir.Node, kind: str, inputs: Sequence[ir.Value]) -> ir.Value:
    added = ir.Node("", kind, inputs, name=f"{node.name}.{kind}")
    added.outputs[0].name = added.name
    graph.insert_before(node, added)
    return added.outputs[0]


def _constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    if name in graph.initializers:  # made for another product
        return graph.initializers[name]
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
