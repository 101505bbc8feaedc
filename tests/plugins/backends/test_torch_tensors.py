"""An encoder on the torch backend: padded batches are the sequences one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optkit.engine.tensors import padded
from optkit.errors import DamagedError
from optkit.steps import Limits, TensorSpec
from optkit.transforms import TransformContext
from optkit.weights import save_folder
from optkit_backends.torch import Torch
from optkit_backends.torch.tensors import TorchTensorSession
from optkit_quantize.rtn import RTN

RANDOM = np.random.default_rng(0)
SEQUENCES = [tuple(RANDOM.integers(10, 300, size=length).tolist()) for length in (40, 1, 7, 64)]


@pytest.mark.parametrize("bits", [None, 8])
def test_a_padded_batch_is_its_sequences_alone(tiny_bert, tmp_path, bits):
    model = tiny_bert()
    if bits is not None:
        model = RTN(bits=bits).apply(model, TransformContext(lambda *_: None))
    save_folder(model, tmp_path)
    with Torch().open(tmp_path, tmp_path, Limits(4, 64)) as session:
        assert isinstance(session, TorchTensorSession)
        outputs = session.run(padded(SEQUENCES, session.inputs))
    [(name, spec)] = session.outputs.items()
    hidden = outputs[name]
    assert spec == TensorSpec("float32", (None, None, 32))
    assert set(session.inputs.values()) == {TensorSpec("int64", (None, None))}
    assert (hidden.shape, hidden.dtype) == ((4, 64, 32), np.float32)
    for row, ids in zip(hidden, SEQUENCES, strict=True):
        with torch.inference_mode():
            alone = model.module(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(row[: len(ids)], alone, rtol=1e-4, atol=1e-5)


def test_it_lowers_models_of_one_call_and_no_other_tasks():
    for task in ("task:feature-extraction", "task:image-classification"):
        assert task not in Torch().lowering(frozenset({task, "weights:float"}))
    lowered = Torch().lowering(frozenset({"task:token-classification", "weights:float"}))
    assert not lowered["task:token-classification"].possible


def test_a_damaged_configuration_is_named(tmp_path):
    with pytest.raises(DamagedError, match=r"config\.json: not readable JSON"):
        Torch().open(tmp_path, tmp_path, Limits(1, 8))
