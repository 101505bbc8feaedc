"""Padding that the products of query and key hide themselves, on the onnxruntime backend."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

pytest.importorskip("onnxruntime")

from optkit.engine.tensors import padded
from optkit.steps import Limits
from optkit_backends.onnxruntime import OnnxRuntime, export
from optkit_backends.onnxruntime.files import GRAPH
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.int8_static import Int8Static
from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts

BACKEND, LIMITS = OnnxRuntime(threads=1), Limits(4, 64)
SEQUENCES = [tuple(range(10, 50)), (7,), tuple(range(5, 18)), tuple(range(3, 67))]
FORMATS = {
    "float": None,
    "static": Int8Static(observer="minmax"),
    "static, 7 bits": Int8Static(observer="minmax", bits=7),
    "by token": Int8Dynamic(),
    "weights of channels": RTN(bits=8, symmetric=False),
    "weights of groups": RTN(bits=8, granularity="group", group_size=32),
}


def copies(graph):
    """Whether query and key of each attention are copied for one more feature."""
    products = [node for node in graph if node.op_type == "MultiHeadAttention"]
    assert products
    makers = [value.producer() for node in products for value in node.inputs[:2]]
    return {node.op_type == "Reshape" and node.inputs[0].producer().op_type == "Concat" for node in makers}


@pytest.mark.parametrize("format", FORMATS)
def test_products_give_the_feature_and_nothing_else_changes(format, tiny_bert, tmp_path, monkeypatch):
    transform = FORMATS[format]
    model = tiny_bert() if transform is None else transform.apply(tiny_bert(), context(texts(*[24] * 4)))
    found = {}
    for name in ("given", "appended"):
        directory = tmp_path / name
        directory.mkdir()
        if name == "appended":
            monkeypatch.setattr(export, "take_in", lambda graph: None)
        BACKEND.compile(model, directory)
        graph = ir.load(directory / GRAPH).graph
        # Products of groups take no column more.
        assert copies(graph) == {name == "appended" or format == "weights of groups"}
        assert len({node.name for node in graph}) == len(graph)
        assert not {value for value in graph.initializers.values() if not value.uses()}
        with BACKEND.open(directory, directory, LIMITS) as session:
            [hidden] = session.run(padded(SEQUENCES, session.inputs)).values()
            layers = {time.layer for time in session.profile(padded(SEQUENCES, session.inputs)) if time.operations}
        found[name] = [row[: len(ids)] for row, ids in zip(hidden, SEQUENCES, strict=True)]
        assert {"encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.key"} <= layers
    # A last bit may tip a rounding.
    tolerance = 1e-5 if transform is None else 0.01
    for given, appended in zip(*found.values(), strict=True):
        assert np.linalg.norm(given - appended) <= tolerance * np.linalg.norm(appended)
    with torch.inference_mode():
        alone = model.module(input_ids=torch.tensor([SEQUENCES[0]])).last_hidden_state[0].numpy()
    assert np.linalg.norm(found["given"][0] - alone) < 0.2 * np.linalg.norm(alone)


def test_layers_that_share_a_bias_hide_padding_each_in_its_own_way(tiny_bert, tmp_path):
    model = tiny_bert()
    first, second = (layer.attention.self for layer in model.module.encoder.layer)
    # The exporter keeps equal constants once. A key's feature is 0, and a query's must not be.
    with torch.no_grad():
        for bias in (first.key.bias, second.query.bias):
            bias.copy_(torch.linspace(-1, 1, len(bias)))
        first.query.bias.fill_(0.5)
    BACKEND.compile(model, tmp_path)
    with BACKEND.open(tmp_path, tmp_path, LIMITS) as session:
        [hidden] = session.run(padded(SEQUENCES, session.inputs)).values()
    for row, ids in zip(hidden, SEQUENCES, strict=True):
        with torch.inference_mode():
            alone = model.module(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        assert np.linalg.norm(row[: len(ids)] - alone) < 1e-4 * np.linalg.norm(alone)
