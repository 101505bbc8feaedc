"""An ONNX graph that grows node by node, its weights streamed to a file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.quantized import ActivationScheme, QuantizedLinear
from optkit.shapes import LowRankLinear
from optkit_backends.onnxruntime.files import GRAPH, WEIGHTS
from optkit_backends.onnxruntime.integers import Blocks, blocked

__all__ = ["MICROSOFT", "GraphBuilder"]

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10
# What memory mapping needs, so that ONNX Runtime reads weights in place.
ALIGNMENT = 4096
# Shapes and other small constants live in the graph itself, where shape inference can read them.
INLINE_BYTES = 128
# The kernel's scales are those of blocks of a token's features, which only makes them finer.
_BY_TOKEN = ActivationScheme(dynamic=True)


class GraphBuilder:
    """Nodes, inputs, outputs and constants of a graph. Weights go straight to `directory`, one in memory at a time.

    Attributes:
        inputs: by name, in order.
        outputs: in order.
    """

    def __init__(self, directory: Path, accuracy_level: int, block_size: int) -> None:
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[ir.Value] = []
        self._accuracy_level, self._block_size = accuracy_level, block_size
        self._nodes: list[ir.Node] = []
        self._constants: dict[str, ir.Value] = {}
        self._directory = directory
        self._offset = 0

    def save(self, name: str) -> None:
        """Write the graph beside its weights."""
        graph = ir.Graph(
            list(self.inputs.values()),
            self.outputs,
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports=OPSETS,
            name=name,
        )
        ir.save(ir.Model(graph, ir_version=IR_VERSION, producer_name="optkit"), self._directory / GRAPH)

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        self.inputs[name] = ir.val(name, dtype, shape)
        return self.inputs[name]

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Make `value` an output of the graph."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.outputs.append(value)

    def node(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Add an operator with one output."""
        return self.nodes(kind, inputs, name, domain, 1, **attributes)[0]

    def nodes(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add an operator with several outputs."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}:{index}"
        self._nodes.append(node)
        return list(node.outputs)

    def constant(self, name: str, tensor: Tensor | npt.NDArray[Any]) -> ir.Value:
        """The initializer `name`, written the first time that it is asked for; floats become float32."""
        if name not in self._constants:
            if isinstance(tensor, Tensor):
                tensor = tensor.detach()
                tensor = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
            array = np.ascontiguousarray(tensor)
            self._constants[name] = ir.val(
                name,
                const_value=ir.tensor(array, name=name) if array.nbytes <= INLINE_BYTES else self._stored(name, array),
            )
        return self._constants[name]

    def reshaped(self, name: str, source: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The initializer `source` under another shape. Both read the same bytes of the file, if it is there."""
        tensor: Any = source.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            return self.constant(name, tensor.numpy().reshape(shape))
        self._constants[name] = ir.val(
            name, const_value=self._external(name, tensor.dtype, shape, tensor.offset, tensor.length)
        )
        return self._constants[name]

    def linear(self, hidden: ir.Value, layer: nn.Linear | QuantizedLinear | LowRankLinear, name: str) -> ir.Value:
        """A layer as one product of `hidden` `[tokens, in]`, or one of low rank as two; `name` is its path."""
        if isinstance(layer, LowRankLinear):
            first, second = layer.factors
            return self.linear(self.linear(hidden, first, f"{name}.0"), second, f"{name}.1")
        return self.stacked(hidden, [layer], name)

    def stacked(self, hidden: ir.Value, layers: Sequence[nn.Linear | QuantizedLinear], name: str) -> ir.Value:
        """Layers of one format as a single product, their outputs side by side.

        Args:
            hidden: `[tokens, in]`.
            layers: all float, or all quantized with the same scheme.
            name: module path of the product.
        """
        bias = None
        if any(layer.bias is not None for layer in layers):
            filled = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
            bias = self.constant(f"{name}.bias", torch.cat(filled))
        quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
        if not quantized:
            weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
            operands = [hidden, self.constant(f"{name}.weight", weight)]
            return self.node("Gemm", operands if bias is None else [*operands, bias], name, transB=1)
        blocks, constants = self.integers(quantized, name)
        return self.node(
            "MatMulNBits",
            [hidden, *constants, None, bias],
            name,
            MICROSOFT,
            K=layers[0].in_features,
            N=sum(layer.out_features for layer in layers),
            bits=blocks.bits,
            block_size=blocks.block_size,
            accuracy_level=self._accuracy_level,
        )

    def integers(self, layers: Sequence[QuantizedLinear], name: str) -> tuple[Blocks, list[ir.Value | None]]:
        """The weights of quantized layers as MatMulNBits reads them: data, scales, and zero points or None.

        Raises:
            RecipeError: the kernel cannot read the weights, or round the input, as the layers say.
        """
        for layer in layers:
            if layer.scheme.type == "float":
                raise RecipeError("MatMulNBits of ONNX Runtime stores integers", where=name, found=layer.scheme.tag)
            how = layer.activations
            if how is not None and (how != _BY_TOKEN or self._accuracy_level != 4):
                raise RecipeError(
                    "MatMulNBits of ONNX Runtime rounds inputs to symmetric int8 as they come, at accuracy_level 4",
                    where=name,
                    found=how.tag,
                )
        blocks = blocked(layers, self._block_size, name)
        shape = (*blocks.scales.shape, blocks.block_size * blocks.bits // 8)
        zero_points = blocks.zero_points
        return blocks, [
            self.constant(f"{name}.weight", blocks.data.reshape(shape)),
            self.constant(f"{name}.scale", blocks.scales),
            None if zero_points is None else self.constant(f"{name}.zero_point", zero_points),
        ]

    def _stored(self, name: str, array: npt.NDArray[Any]) -> ir.ExternalTensor:
        with (self._directory / WEIGHTS).open("ab") as file:
            file.write(bytes(-self._offset % ALIGNMENT))
            offset = file.tell()
            file.write(array.data)
            self._offset = file.tell()
        return self._external(name, ir.DataType.from_numpy(array.dtype), array.shape, offset, array.nbytes)

    def _external(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], offset: int | None, length: int | None
    ) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            WEIGHTS, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self._directory
        )
