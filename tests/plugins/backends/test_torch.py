"""The torch session against transformers: every shape of step gives the logits of the whole sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optkit.engine import Engine, Request, SamplingParams
from optkit.errors import RecipeError
from optkit.steps import Limits, Row, StepPlan
from optkit.transforms import TransformContext
from optkit.weights import save_folder
from optkit_backends.torch import Torch
from optkit_batching.static import Static
from optkit_quantize.rtn import RTN

A, B, C = tuple(range(10, 30)), tuple(range(40, 47)), tuple(range(5, 18))


@pytest.fixture(scope="module")
def opened(tiny_llama, tmp_path_factory):
    model = tiny_llama()
    weights = tmp_path_factory.mktemp("weights")
    save_folder(model, weights)
    return model, weights


@pytest.fixture
def session(opened, tmp_path):
    with Torch().open(tmp_path, opened[1], Limits(max_batch_size=4, max_length=64)) as session:
        yield session


def expected(opened, tokens):
    return opened[0].module(torch.tensor([tokens])).logits[0].numpy()


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


def test_ragged_prompts_in_any_slots(opened, session):
    result = session.execute(StepPlan((Row(1, A, 0, (3,), "all"), Row(2, B, 0, (0,)), Row(3, C, 0, (2,), "none"))))
    close(result.logits[0], expected(opened, A))
    close(result.logits[1], expected(opened, B)[-1:])
    assert result.logits[2].shape[0] == 0


def test_prompts_in_chunks_beside_decoding_rows(opened, session):
    session.execute(StepPlan((Row(1, A[:7], 0, (1,), "none"), Row(2, B, 0, (2,)))))
    result = session.execute(StepPlan((Row(1, A[7:], 7, (1,)), Row(2, (50,), 7, (2,)), Row(3, C, 0, (0,)))))
    close(result.logits[0], expected(opened, A)[-1:])
    close(result.logits[1], expected(opened, (*B, 50))[-1:])
    close(result.logits[2], expected(opened, C)[-1:])


def test_a_slot_is_used_again_without_a_trace(opened, session):
    session.execute(StepPlan((Row(1, A, 0, (0,)),)))
    close(session.execute(StepPlan((Row(2, B, 0, (0,), "all"),))).logits[0], expected(opened, B))


def test_generates_what_transformers_generates(opened, session):
    engine = Engine(session, Static(max_batch_size=3))
    ids = [engine.add(Request(p, SamplingParams(max_tokens=12, ignore_eos=True))) for p in (A, B, C)]
    output = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            output[event.request].append(event.token)
    for id, prompt in zip(ids, (A, B, C), strict=True):
        whole = opened[0].module.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
        )
        assert output[id] == whole[0, len(prompt) :].tolist()


def test_integer_weights_give_their_reference(tiny_llama, tmp_path):
    model = RTN(bits=4, granularity="group", group_size=32).apply(
        tiny_llama(), TransformContext(progress=lambda done, total, what: None)
    )
    save_folder(model, tmp_path / "weights")
    with Torch().open(tmp_path, tmp_path / "weights", Limits(1, 64)) as session:
        close(session.execute(StepPlan((Row(1, A, 0, (0,), "all"),))).logits[0], expected((model,), A))


def test_says_that_integers_are_dequantized():
    lowering = Torch().lowering(frozenset({"task:causal-lm", "arch:llama", "weights:float", "weights:int4-group"}))
    assert lowering["weights:float"].native
    assert not lowering["weights:int4-group"].native
    assert "dequantized" in lowering["weights:int4-group"].reason
    assert not Torch().lowering(frozenset({"task:vision"}))["task:vision"].possible


def test_profile_names_every_layer(session):
    times = session.profile(StepPlan((Row(1, A, 0, (0,)),)))
    layers = {time.layer: time for time in times}
    assert layers["model.layers.1.mlp.down_proj"].weight_bytes == 64 * 128 * 4
    assert layers["lm_head"].kernel == "Linear"
    assert all(time.seconds >= 0 for time in times)


def test_a_sliding_window_that_is_too_short_is_refused(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    from optkit.model import Model

    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    save_folder(Model(MistralForCausalLM(config), None, frozenset()), tmp_path)
    with pytest.raises(RecipeError, match=r"window of 16 tokens.* found 32; set max_length to 16 or less"):
        Torch().open(tmp_path, tmp_path, Limits(1, 32))
    Torch().open(tmp_path, tmp_path, Limits(1, 16)).close()
