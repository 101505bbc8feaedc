"""Layers with quantized activations: what each backend says of them, and what it runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from optkit.backends import Backend, TokenSession
from optkit.calibration import Calibration
from optkit.errors import RecipeError
from optkit.steps import Limits, Row, StepPlan
from optkit.transforms import TransformContext
from optkit.weights import save_folder
from optkit_backends.onnxruntime import OnnxRuntime
from optkit_backends.torch import Torch
from optkit_quantize.fp8 import FP8
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.int8_static import Int8Static
from optkit_quantize.rtn import RTN
from optkit_quantize.w4a8 import W4A8

TOKENS = tuple(range(3, 40))
BATCH = {"input_ids": torch.tensor([TOKENS]), "attention_mask": torch.ones(1, len(TOKENS), dtype=torch.long)}
CONTEXT = TransformContext(lambda *_: None, Calibration((BATCH,)))
STEPS = {
    "int8 dynamic": Int8Dynamic(),
    "int8 static": Int8Static(),
    "int8 static symmetric": Int8Static(symmetric=True),
    "fp8 dynamic": FP8(),
    "fp8 static": FP8(activations="static"),
    "w4a8": W4A8(group_size=32),
}


def score(backend, model, folder, blocks: Sequence[int]) -> np.ndarray:
    save_folder(model, folder / "weights")
    (folder / "runtime").mkdir()
    backend.compile(model, folder / "runtime")
    with backend.open(folder / "runtime", folder / "weights", Limits(2, 64)) as session:
        assert isinstance(session, TokenSession)
        return session.execute(StepPlan((Row(1, TOKENS, 0, tuple(blocks), "all"),))).logits[0]


def distance(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def logits(model):
    return model.module(BATCH["input_ids"]).logits[0].numpy()


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_torch_rounds_inputs_as_the_model_says(tiny_llama, tmp_path, step):
    model = step.apply(tiny_llama(), CONTEXT)
    lowering = Torch().lowering(model.tags)
    [tag] = [tag for tag in model.tags if tag.startswith("activations:")]
    assert (lowering[tag].possible, lowering[tag].native) == (True, False)
    assert "quality is that of the artifact, speed is not" in lowering[tag].reason
    expected, float_logits = logits(model), logits(tiny_llama())
    found = score(Torch(), model, tmp_path, range(3))
    assert distance(found, expected) < lowering[tag].tolerance
    # Far closer than the model is to the float one: the rounding is there.
    assert distance(found, expected) < 0.2 * distance(float_logits, expected)


def test_torch_rounds_inputs_of_encoders(tiny_bert, tmp_path):
    model = Int8Dynamic(ignore=("pooler.dense",)).apply(tiny_bert(), CONTEXT)
    save_folder(model, tmp_path)
    ids = np.array([[5, 200, 31, 7]])
    with Torch().open(tmp_path, tmp_path, Limits(1, 64)) as session:
        found = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["last_hidden_state"]
    expected = model.module(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    assert distance(found, expected) < 1e-3


@pytest.mark.parametrize("step", [Int8Dynamic(), W4A8(group_size=32)], ids=["int8", "w4a8"])
def test_onnxruntime_rounds_inputs_block_by_block(tiny_llama, tmp_path, step):
    model = step.apply(tiny_llama(), CONTEXT)
    lowering = OnnxRuntime().lowering(model.tags)
    assert all(lowered.possible for lowered in lowering.values())
    lowered = lowering["activations:int8-dynamic"]
    assert "blocks of 64 input features or fewer, finer than token by token" in lowered.reason
    found = score(OnnxRuntime(threads=1), model, tmp_path, [0])
    assert distance(found, logits(model)) < lowered.tolerance


@pytest.mark.parametrize("name", ["int8 static", "int8 static symmetric", "fp8 dynamic", "fp8 static"])
def test_onnxruntime_refuses_other_activations_of_decoders(tiny_llama, tmp_path, name):
    model = STEPS[name].apply(tiny_llama(), CONTEXT)
    [tag] = [tag for tag in model.tags if tag.startswith("activations:")]
    lowered = OnnxRuntime().lowering(model.tags)[tag]
    assert not lowered.possible
    assert "symmetric int8 as they come" in lowered.reason
    with pytest.raises(RecipeError, match="MatMulNBits of ONNX Runtime"):
        OnnxRuntime().compile(model, tmp_path)


def test_float_activations_are_not_taken_for_rounded_ones(tiny_llama, tmp_path):
    exact = OnnxRuntime(accuracy_level=1)
    model = Int8Dynamic().apply(tiny_llama(), CONTEXT)
    assert "set accuracy_level to 4" in exact.lowering(model.tags)["activations:int8-dynamic"].reason
    assert not exact.lowering(model.tags)["activations:int8-dynamic"].possible
    with pytest.raises(RecipeError, match="at accuracy_level 4"):
        exact.compile(model, tmp_path)


@pytest.mark.parametrize("backend", [Torch(), OnnxRuntime()], ids=["torch", "onnxruntime"])
def test_every_tag_of_activations_gets_an_answer(backend: Backend):
    tags = [f"activations:{kind}" for kind in ("int8-dynamic", "int8-static-asym", "fp8-static", "int4-dynamic")]
    lowering = backend.lowering(frozenset({"task:causal-lm", "arch:llama", "weights:float", *tags}))
    assert set(tags) <= lowering.keys()
    assert not lowering["activations:int4-dynamic"].possible
    assert all(lowered.reason for tag, lowered in lowering.items() if tag in tags)


def test_weights_alone_say_nothing_of_activations(tiny_llama):
    model = RTN().apply(tiny_llama(), CONTEXT)
    assert not [tag for tag in Torch().lowering(model.tags) if tag.startswith("activations:")]
