"""What becomes of int8 convolutions in ONNX graphs where batch norms follow them."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

from optkit.calibration import Calibration
from optkit.model import Model
from optkit.transforms import TransformContext
from optkit_backends.onnxruntime.export import compile_tensors
from optkit_backends.onnxruntime.files import GRAPH
from optkit_backends.onnxruntime.tensors import OnnxTensorSession
from optkit_quantize.int8_static import Int8Static


def normed(channels, *, lowest):
    """A batch norm that has seen something, its weights not below `lowest`."""
    norm = nn.BatchNorm2d(channels)
    for tensor, low, high in (
        (norm.weight, lowest, 1.5),
        (norm.bias, -0.5, 0.5),
        (norm.running_mean, -0.3, 0.3),
        (norm.running_var, 0.5, 2.0),
    ):
        tensor.data.uniform_(low, high)
    return norm


@pytest.mark.parametrize(("lowest", "bias"), [(0.5, False), (-1.0, True)], ids=["positive", "negative"])
def test_batch_norms_become_part_of_integer_convolutions(lowest, bias, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=bias),
            normed(8, lowest=lowest),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, bias=bias),
            normed(6, lowest=lowest),
        )
        images = torch.randn(16, 3, 10, 10)
    module = module.eval().requires_grad_(False)
    data = Calibration(tuple({"input": rows} for rows in images.split(4)))
    quantizer = Int8Static(targets=("Conv2d",), ignore=())
    model = quantizer.apply(Model(module, None, frozenset({"weights:float"})), TransformContext(lambda *_: None, data))
    compile_tensors(model.module, {"input": images[:1]}, tmp_path)
    with OnnxTensorSession(tmp_path, threads=1, spin=False) as session:
        found = torch.from_numpy(session.run({"input": images.numpy()})["output"])
    wanted = model.module(images)
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    ran = Counter(node.op_type for node in ir.load(tmp_path / GRAPH).graph)
    assert ran["BatchNormalization"] == 0
    # The last convolution gives floats, and so does one with a scale below 0, which turns what follows around.
    assert (ran["QLinearConv"], ran["ConvInteger"]) == ((0, 2) if lowest < 0 else (1, 1))
