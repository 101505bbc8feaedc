"""Backends on models whose layers differ in shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from optkit.steps import Limits, Row, StepPlan
from optkit.weights import load_folder, save_folder
from optkit_backends.onnxruntime import OnnxRuntime
from optkit_backends.torch import Torch
from optkit_backends.torchscript import TorchScript
from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts
from tests.shaping import behead, encoder_block, factored, narrow

BACKENDS = [Torch(), OnnxRuntime(accuracy_level=1), TorchScript()]
TOKENS = tuple(range(7, 47))


@pytest.fixture
def uneven(tiny_llama):
    """A Llama whose every layer has other widths and heads, and one a linear layer of low rank."""
    model = tiny_llama(num_hidden_layers=3)
    for layer, width, (queries, keys) in zip(
        model.module.model.layers, (128, 96, 32), ((4, 2), (2, 2), (2, 1)), strict=True
    ):
        narrow(layer.mlp, width)
        behead(layer.self_attn, queries, keys)
    for name in ("0.mlp.down_proj", "1.self_attn.v_proj", "2.self_attn.q_proj"):
        factored(model.module, f"model.layers.{name}", 16)
    return replace(model, tags=model.tags | {"shape:pruned"})


def compiled(backend, model, folder):
    for name in ("runtime", "weights"):
        (folder / name).mkdir(parents=True)
    save_folder(model, folder / "weights")
    backend.compile(load_folder(folder / "weights"), folder / "runtime")
    return folder / "runtime", folder / "weights"


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: type(backend).__name__)
def test_a_decoder_of_several_shapes_gives_the_modules_own_logits(uneven, tmp_path, backend, quantized):
    model = RTN(bits=8).apply(uneven, context(texts())) if quantized else uneven
    assert all(lowered.possible for lowered in backend.lowering(model.tags).values())
    expected = model.module(torch.tensor([TOKENS])).logits[0].numpy()
    with backend.open(*compiled(backend, model, tmp_path), Limits(2, 64)) as session:
        size = session.caps.block_size
        blocks = tuple(range(-(-64 // size)))
        whole = session.execute(StepPlan((Row(0, TOKENS, 0, blocks, "all"),))).logits[0]
        assert np.linalg.norm(whole - expected) / np.linalg.norm(expected) < 1e-4
        # Moved to other blocks, the cache still is that of the text.
        others = tuple(len(blocks) + block for block in blocks)
        session.write_blocks(others, session.read_blocks(blocks))
        last = session.execute(StepPlan((Row(1, TOKENS[-1:], len(TOKENS) - 1, others),))).logits[0][0]
        assert np.linalg.norm(last - expected[-1]) / np.linalg.norm(expected[-1]) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: type(backend).__name__)
def test_an_encoder_of_several_shapes_gives_the_modules_own_output(tiny_bert, tmp_path, backend):
    model = tiny_bert()
    encoder_block(model.module.encoder.layer[1], width=24, heads=2)
    factored(model.module, "encoder.layer.0.output.dense", 16)
    ids = torch.tensor([TOKENS, TOKENS[::-1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.module(**inputs)[0].numpy()
    with backend.open(*compiled(backend, model, tmp_path), Limits(2, 64)) as session:
        found = session.run({name: tensor.numpy() for name, tensor in inputs.items()})["last_hidden_state"]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
