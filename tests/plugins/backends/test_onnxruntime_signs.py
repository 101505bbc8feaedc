"""Signed and unsigned weights of integer products: the same numbers, whichever the processor multiplies faster."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

from optkit import hardware
from optkit.quantized import QuantizedConv2d, QuantizedLinear
from optkit.schemes import ActivationScheme, WeightScheme
from optkit_backends.onnxruntime.export import compile_tensors
from optkit_backends.onnxruntime.files import GRAPH
from optkit_backends.onnxruntime.signs import OPERANDS, with_signed_weights
from optkit_backends.onnxruntime.tensors import OnnxTensorSession

STATIC, TOKENS = ActivationScheme(dynamic=False, symmetric=False), ActivationScheme(dynamic=True)
# The zero point is that of unsigned weights, so that the graph has it once.
GRID = torch.tensor([0.02]), torch.tensor([0], dtype=torch.int8)


class Products(nn.Module):
    """All operators of integer weights, which are so small that no processor's products saturate."""

    def __init__(self, bits):
        super().__init__()
        channel, shifted = WeightScheme(bits, None, symmetric=True), WeightScheme(bits, None, symmetric=False)

        def linear(inputs, outputs, scheme, activations, *grid):
            zero_point = None if scheme.symmetric else torch.randint(-9, 9, (outputs, 1), dtype=torch.int8)
            weight = torch.randint(-64, 64, (outputs, inputs), dtype=torch.int8)
            scale = torch.rand(outputs, 1) / inputs
            return QuantizedLinear(weight, scale, zero_point, torch.rand(outputs), scheme, activations, *grid)

        # Its weights lie in the file beside the graph, those of the others in the graph.
        self.large = linear(64, 96, channel, STATIC, *GRID)
        self.small, self.by_token = linear(96, 2, shifted, STATIC, *GRID), linear(96, 2, channel, TOKENS)

        def convolution():
            layer = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
            weight = torch.randint(-64, 64, layer.weight.shape, dtype=torch.int8)
            return QuantizedConv2d(layer, weight, torch.rand(4, 1) / 99, None, layer.bias, channel, STATIC, *GRID)

        self.first, self.second = convolution(), convolution()

    def forward(self, pixels):
        hidden = self.large(self.second(self.first(pixels).relu()).flatten(2))
        return {"static": self.small(hidden), "by_token": self.by_token(hidden)}


@pytest.fixture
def inputs():
    torch.manual_seed(3)
    return {"pixels": torch.randn(3, 4, 8, 8)}


def test_signed_weights_give_the_same_numbers(inputs, tmp_path, monkeypatch):
    module = Products(8).eval()
    compile_tensors(module, inputs, tmp_path)
    with torch.inference_mode():
        wanted = module(**inputs)
    changed = with_signed_weights(tmp_path / GRAPH)
    assert changed is not None
    graph, given = onnx.load_from_string(changed[0]).graph, changed[1]
    signed = {tensor.name: tensor.data_type for tensor in graph.initializer}
    ran = [node for node in graph.node if node.op_type in OPERANDS]
    assert Counter(node.op_type for node in ran) == {"QLinearConv": 2, "MatMulIntegerToFloat": 3}
    for node in ran:
        weight, zero_point = OPERANDS[node.op_type]
        assert signed[node.input[weight]] == signed[node.input[zero_point]] == onnx.TensorProto.INT8
    assert {array.shape for array in given.values()} == {(64, 96)}
    found = []
    for exact in (False, True):
        monkeypatch.setattr(hardware, "exact_byte_products", lambda exact=exact: exact)
        with OnnxTensorSession(tmp_path, threads=1, spin=False) as session:
            found.append(session.run({"pixels": inputs["pixels"].numpy()}))
            times = session.profile({"pixels": inputs["pixels"].numpy()})
        assert [time.integer for time in times if time.operations] == [True] * 5
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[0][name], found[1][name])
        assert np.linalg.norm(found[1][name] - tensor.numpy()) < 0.01 * tensor.norm()


def test_graphs_whose_weights_are_signed_stay_as_they_are(inputs, tmp_path):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Products(7)

        def forward(self, pixels):
            return self.layers.large(pixels.flatten(2))

    compile_tensors(Narrow().eval(), inputs, tmp_path)
    assert with_signed_weights(tmp_path / GRAPH) is None


def test_weights_that_a_convolution_of_unsigned_ones_reads_too_stay_unsigned(inputs, tmp_path, monkeypatch):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Products(8)

        def forward(self, pixels):
            # The first is followed by a rounding, the second is not.
            return self.layers.first(self.layers.first(pixels).relu())

    module = Twice().eval()
    compile_tensors(module, inputs, tmp_path)
    ran = Counter(node.op_type for node in onnx.load(tmp_path / GRAPH, load_external_data=False).graph.node)
    assert (ran["QLinearConv"], ran["ConvInteger"]) == (1, 1)
    monkeypatch.setattr(hardware, "exact_byte_products", lambda: True)
    with OnnxTensorSession(tmp_path, threads=1, spin=False) as session:
        [found] = session.run({"pixels": inputs["pixels"].numpy()}).values()
    with torch.inference_mode():
        wanted = module(**inputs).numpy()
    assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)
