"""Every pruner's model, and the same in int8, on every backend: its module's own answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optkit.engine.tensors import padded
from optkit.quantized import quantized_layers
from optkit.steps import Limits, Row, StepPlan
from optkit.weights import load_folder, save_folder
from optkit_backends.onnxruntime import OnnxRuntime
from optkit_backends.torch import Torch
from optkit_backends.torchscript import TorchScript
from optkit_prune.layers import Layers
from optkit_prune.magnitude import Magnitude
from optkit_prune.random import Random
from optkit_prune.sparsegpt import SparseGPT
from optkit_prune.structured import Structured
from optkit_prune.svd import SVD
from optkit_prune.wanda import Wanda
from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts

BACKENDS = [Torch(), OnnxRuntime(accuracy_level=1), TorchScript()]
TOKENS = tuple(range(7, 47))
DATA = texts(*[24] * 8)
MASKS = {
    "magnitude": Magnitude(sparsity=0.5),
    "random": Random(sparsity=0.5),
    "wanda": Wanda(pattern="2:4"),
    "sparsegpt": SparseGPT(sparsity=0.5),
}
SHAPES = {
    "ffn": Structured(parts=("ffn",), ratio=0.25, round_to=16),
    "heads": Structured(parts=("heads",), ratio=0.5),
    "width": Structured(parts=("width",), ratio=0.25, round_to=16),
    "uneven": Structured(parts=("ffn",), ratio=0.25, allocation="global"),
    "layers": Layers(count=1),
    "svd": SVD(ratio=0.25),
}
ENCODERS = SHAPES | {"thin": SVD(ratio=0.3, round_to=8)}
by_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: type(backend).__name__)


def opened(backend, model, folder):
    """A session over what is on disk, and the module that is."""
    for name in ("runtime", "weights"):
        (folder / name).mkdir()
    save_folder(model, folder / "weights")
    loaded = load_folder(folder / "weights", tags=model.tags)
    backend.compile(loaded, folder / "runtime")
    return backend.open(folder / "runtime", folder / "weights", Limits(2, 64)), loaded.module


def distance(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("pruner", [*MASKS, *SHAPES])
@by_backend
def test_a_pruned_decoder_runs(tiny_llama, tmp_path, backend, pruner, bits):
    plain = tiny_llama(num_hidden_layers=3)
    size = plain.module.num_parameters()
    model = (MASKS | SHAPES)[pruner].apply(plain, context(DATA))
    assert (model.module.num_parameters() < size) == (pruner in SHAPES)
    zeros = {
        name: layer.weight == 0
        for name, layer in model.module.named_modules()
        if pruner in MASKS and isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    assert all(zero.sum() == zero.numel() // 2 for zero in zeros.values())
    if bits is not None:
        model = RTN(bits=bits).apply(model, context(texts()))
    assert all(how.possible for how in backend.lowering(model.tags).values())
    wanted = model.module(torch.tensor([TOKENS])).logits[0].numpy()
    session, module = opened(backend, model, tmp_path)
    stored = dict(quantized_layers(module)) if bits else {}
    for name, zero in zeros.items():
        weight = stored[name].dequantized() if bits else module.get_submodule(name).weight
        assert (weight[zero] == 0).all()
    with session:
        blocks = tuple(range(-(-64 // session.caps.block_size)))
        found = [session.execute(StepPlan((Row(0, TOKENS[:30], 0, blocks, "all"),))).logits[0]]
        found += [session.execute(StepPlan((Row(0, TOKENS[i : i + 1], i, blocks),))).logits[0] for i in range(30, 40)]
    assert distance(np.concatenate(found), wanted) < 1e-4


@pytest.mark.parametrize("pruner", ["magnitude", "ffn", "heads", "layers", "thin"])
@by_backend
def test_a_pruned_encoder_runs(tiny_bert, tmp_path, backend, pruner):
    model = (MASKS | ENCODERS)[pruner].apply(tiny_bert(), context(DATA))
    with torch.inference_mode():
        wanted = model.module(input_ids=torch.tensor([TOKENS])).last_hidden_state[0].numpy()
    session, _ = opened(backend, model, tmp_path)
    with session:
        [[found, _]] = session.run(padded([TOKENS, TOKENS[:5]], session.inputs)).values()
    assert distance(found, wanted) < 1e-4
