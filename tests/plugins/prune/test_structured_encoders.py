"""prune.structured on encoders: heads, which only optkit's loader reads, and FFNs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit.builtin.huggingface import encoder_card_of
from optkit.errors import RecipeError
from optkit.schemes import SHAPES_ENTRY
from optkit.steps import Limits
from optkit.weights import load_folder, save_folder
from optkit_backends.torch import Torch
from optkit_prune.structured import Structured
from tests.calibrating import context, texts
from tests.shaping import places, refusal

DATA = texts(12, 20, 15)
IDS = DATA.inputs[1]["input_ids"]
IMPORTANCES = ("magnitude", "taylor", "activation", "hessian", "random")


def card(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
    return encoder_card_of(model.module.config.to_dict(), shapes, model.files, {}, name="tiny")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    ratio=st.one_of(st.floats(0.01, 0.95), st.sampled_from([0.25, 0.5, 0.75])),
    heads=st.sampled_from([1, 2, 4, 8]),
    parts=st.sampled_from([("ffn",), ("heads",), ("ffn", "heads")]),
    importance=st.sampled_from(IMPORTANCES),
    allocation=st.sampled_from(["uniform", "global"]),
)
def test_any_ratio_is_refused_or_gives_the_model_with_zeros(tiny_bert, ratio, heads, parts, importance, allocation):
    model, whole = tiny_bert(num_attention_heads=heads), tiny_bert(num_attention_heads=heads).module
    pruner = Structured(parts=parts, ratio=ratio, importance=importance, allocation=allocation, round_to=16)
    before, size = card(model), 32 // heads
    said = refusal(lambda: pruner.check(before))
    if said is not None:
        assert refusal(lambda: pruner.apply(model, context(DATA))) == said
        return
    module = pruner.apply(model, context(DATA)).module
    left = [0, 0]
    for layer, old in zip(module.encoder.layer, whole.encoder.layer, strict=True):
        inner, previous = layer.intermediate.dense, old.intermediate.dense
        kept = places(inner.weight, previous.weight, 0)
        assert torch.equal(inner.bias, previous.bias[kept])
        assert torch.equal(layer.output.dense.weight, old.output.dense.weight[:, kept])
        old.output.dense.weight[:, [place for place in range(64) if place not in kept]] = 0
        attention, former = layer.attention.self, old.attention.self
        rows = places(attention.query.weight, former.query.weight, 0)
        assert rows == [row // size * size + offset for row in rows[::size] for offset in range(size)]
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(attention, name).weight, getattr(former, name).weight[rows])
            assert torch.equal(getattr(attention, name).bias, getattr(former, name).bias[rows])
        assert (attention.num_attention_heads, attention.all_head_size) == (len(rows) // size, len(rows))
        assert attention.attention_head_size == size
        old.attention.output.dense.weight[:, [row for row in range(32) if row not in rows]] = 0
        left[0] += len(kept)
        left[1] += len(rows) // size
    expected = 2 * math.floor((1 - ratio) * 64 / 16 + 0.5) * 16 if "ffn" in parts else 128
    assert left == [expected, 2 * heads - 2 * round(heads * ratio) * ("heads" in parts)]
    torch.testing.assert_close(module(IDS)[0], whole(IDS)[0], rtol=0, atol=1e-5)
    if allocation == "uniform":
        after = pruner.after(before)
        assert (after.linears, after.parameters) == (card(model).linears, card(model).parameters)


def test_a_narrower_ffn_loads_in_transformers(tiny_bert, tmp_path):
    result = Structured(ratio=0.5, importance="hessian").apply(tiny_bert(), context(DATA))
    assert "shape:pruned" not in result.tags
    exact = result.module(IDS)[0]
    save_folder(result, tmp_path)
    plain = transformers.AutoModel.from_pretrained(tmp_path)
    assert plain.config.intermediate_size == 32
    torch.testing.assert_close(plain(IDS)[0], exact, rtol=0, atol=1e-5)


def test_fewer_heads_load_through_optkit_and_run_on_torch(tiny_bert, tmp_path):
    result = Structured(parts=("ffn", "heads"), ratio=0.5).apply(tiny_bert(), context(DATA))
    assert result.tags >= {"pruned:ffn", "pruned:heads", "shape:pruned"}
    exact = result.module(IDS)[0]
    for name in ("runtime", "weights"):
        (tmp_path / name).mkdir()
    save_folder(result, tmp_path / "weights")
    loaded = load_folder(tmp_path / "weights")
    entry = getattr(loaded.module.config, SHAPES_ENTRY)
    assert entry["encoder.layer.0.attention.self"] == {"num_attention_heads": 2, "all_head_size": 16}
    torch.testing.assert_close(loaded.module(IDS)[0], exact, rtol=0, atol=1e-5)
    backend = Torch()
    backend.compile(loaded, tmp_path / "runtime")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with backend.open(tmp_path / "runtime", tmp_path / "weights", Limits(2, 64)) as session:
        found = session.run({name: tensor.numpy() for name, tensor in inputs.items()})["last_hidden_state"]
    assert np.linalg.norm(found - exact.numpy()) / np.linalg.norm(exact.numpy()) < 1e-5


def test_gradients_of_random_signs_find_who_changes_the_output(tiny_bert):
    """Half of the channels do not reach the output: these go."""
    model = tiny_bert()
    for layer in model.module.encoder.layer:
        layer.output.dense.weight[:, ::2] = 0
    whole = [layer.intermediate.dense.weight.clone() for layer in model.module.encoder.layer]
    for importance in ("taylor", "hessian", "activation"):
        fresh = tiny_bert()
        fresh.module.load_state_dict(model.module.state_dict())
        result = Structured(ratio=0.5, importance=importance).apply(fresh, context(DATA)).module
        for layer, old in zip(result.encoder.layer, whole, strict=True):
            assert places(layer.intermediate.dense.weight, old, 0) == list(range(1, 64, 2))


def test_the_width_of_an_encoder_stays(tiny_bert):
    with pytest.raises(RecipeError, match="width: can be pruned of the language models"):
        Structured(parts=("width",), ratio=0.5).check(card(tiny_bert()))
    with pytest.raises(RecipeError, match="width: can be pruned of the language models"):
        Structured(parts=("width",), ratio=0.5).apply(tiny_bert(), context(DATA))
