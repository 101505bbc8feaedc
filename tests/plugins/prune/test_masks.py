"""What pruners on a mask share: exactly the lowest scores, exactly as many zeros as asked, and which layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.builtin.huggingface import HuggingFace
from optkit.errors import OptkitError, RecipeError
from optkit.model import Model
from optkit_prune.magnitude import Magnitude
from optkit_prune.masks import Masked, lowest, lowest_of_each, spread
from optkit_prune.random import Random
from optkit_prune.sparsegpt import SparseGPT
from optkit_prune.wanda import Wanda
from tests.calibrating import context, texts

PRUNERS = [Magnitude, Random, SparseGPT, Wanda]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
scores = st.integers(1, 6).flatmap(
    lambda width: st.lists(
        # Few values, so that many are equal.
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf]), min_size=width, max_size=width),
        min_size=1,
        max_size=4,
    )
)


@given(scores=scores, data=st.data())
def test_the_lowest_scores_of_each_row_are_chosen_and_of_equal_ones_the_first(scores, data):
    counts = [data.draw(st.integers(0, len(row))) for row in scores]
    mask = lowest(torch.tensor(scores), counts).tolist()
    for row, count, chosen in zip(scores, counts, mask, strict=True):
        expected = sorted(range(len(row)), key=lambda place: (row[place], place))[:count]
        assert [place for place, taken in enumerate(chosen) if taken] == sorted(expected)


@given(rows=st.integers(1, 4), groups=st.integers(1, 4), size=st.integers(2, 8), data=st.data())
def test_every_group_of_a_pattern_keeps_as_many_of_its_highest_scores(rows, groups, size, data):
    kept = data.draw(st.integers(1, size - 1))
    scores = torch.randint(0, 4, (rows, groups * size)).float()
    mask = lowest_of_each(scores, (kept, size))
    assert mask.shape == scores.shape
    for values, taken in zip(scores.reshape(-1, size), mask.reshape(-1, size), strict=True):
        assert taken.sum() == size - kept
        assert values[taken].max() <= values[~taken].min()


@given(total=st.integers(0, 1000), parts=st.integers(1, 50))
def test_a_number_is_spread_evenly(total, parts):
    counts = spread(total, parts)
    assert (len(counts), sum(counts)) == (parts, total)
    assert max(counts) - min(counts) <= 1


def zeros(model: Model) -> dict[str, int]:
    return {name: int((tensor == 0).sum()) for name, tensor in model.module.state_dict().items() if tensor.ndim == 2}


@pytest.fixture
def small(tiny_llama: Callable[..., Model]) -> Callable[..., Model]:
    return lambda **config: tiny_llama(hidden_size=32, intermediate_size=48, **config)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(pruner=st.sampled_from(PRUNERS), sparsity=st.floats(0, 0.95, exclude_min=True))
def test_the_zeros_of_each_layer_are_as_many_as_asked(small, pruner, sparsity):
    dense = small()
    pruned = pruner(sparsity=sparsity).apply(small(), context(texts(20)))
    found = zeros(pruned)
    for name, tensor in dense.module.state_dict().items():
        if name.split(".")[-2] in LINEARS:
            assert found[name] == round(sparsity * tensor.numel()), name
        else:
            assert torch.equal(tensor, pruned.module.state_dict()[name]), name
    assert pruned.tags == dense.tags | {"sparsity:unstructured"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(pruner=st.sampled_from(PRUNERS), pattern=st.sampled_from(["1:2", "2:4", "1:4", "3:4", "4:8", "5:16", "15:16"]))
def test_every_group_of_every_layer_has_the_pattern(small, pruner, pattern):
    kept, size = map(int, pattern.split(":"))
    pruned = pruner(pattern=pattern).apply(small(), context(texts(20)))
    for name, tensor in pruned.module.state_dict().items():
        if name.split(".")[-2] in LINEARS:
            assert ((tensor.reshape(-1, size) != 0).sum(-1) == kept).all(), name
    assert f"sparsity:{pattern}" in pruned.tags


@pytest.mark.parametrize("pruner", PRUNERS)
def test_only_the_targets_are_pruned(small, pruner):
    options = {"targets": (r"re:.*\.(down|up)_proj",), "ignore": ("model.layers.0.mlp.up_proj",)}
    pruned = pruner(sparsity=0.5, **options).apply(small(), context(texts(20)))
    assert [name for name, count in zeros(pruned).items() if count > 100] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_can_be_pruned_too_and_stays_tied(small, pruner, tied):
    model = small(tie_word_embeddings=tied)
    model.module.lm_head.weight[model.module.config.pad_token_id] = 0.1  # transformers makes it zero
    pruned = pruner(sparsity=0.5, targets=("lm_head",), ignore=()).apply(model, context(texts(20))).module
    assert (pruned.lm_head.weight == 0).sum() == pruned.lm_head.weight.numel() // 2
    assert (pruned.lm_head.weight is pruned.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("pruner", PRUNERS)
def test_stored_precision_stays(small, pruner):
    model = small()
    layer = model.module.model.layers[0].mlp.up_proj
    model.module.bfloat16()
    pruned = pruner(sparsity=0.5).apply(model, context(texts(20)))
    assert pruned.module.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert (layer.weight == 0).sum() == layer.weight.numel() // 2


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_encoders_are_pruned_too(tiny_bert, pruner, amount):
    model = pruner(**amount).apply(tiny_bert(), context(texts(20)))
    layers = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert len(layers) == 13
    for name, layer in layers.items():
        assert (layer.weight == 0).sum() == layer.weight.numel() // 2, name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_weight_that_is_not_finite_is_refused_by_its_layer_s_name(small, pruner, bad):
    model = small()
    model.module.model.layers[0].self_attn.v_proj.weight[0, 3] = bad
    with pytest.raises(OptkitError, match=r"^model\.layers\.0\.self_attn\.v_proj: a weight is not finite"):
        pruner(sparsity=0.5).apply(model, context(texts(20)))


@pytest.mark.parametrize("pruner", [SparseGPT, Wanda])
def test_inputs_that_are_not_finite_are_refused_by_name(small, pruner):
    model = small()
    model.module.model.layers[0].post_attention_layernorm.weight[0] = math.nan
    with pytest.raises(OptkitError, match=r"^model\.layers\.0\.mlp\.gate_proj: "):
        pruner(sparsity=0.5).apply(model, context(texts(20)))


@pytest.mark.parametrize("pruner", [SparseGPT, Wanda])
def test_a_layer_that_no_data_reaches_is_refused_by_name(small, pruner):
    model = small()
    layer = model.module.model.layers[1].mlp
    layer.forward = lambda x: layer.down_proj(layer.act_fn(layer.gate_proj(x)))
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.mlp\.up_proj: no calibration data reaches this layer"):
        pruner(sparsity=0.5).apply(model, context(texts(20)))


# --- options


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.5, "pattern": "2:4"},
        {"sparsity": 0.0},
        {"sparsity": 0.96},
        {"sparsity": True},
        {"sparsity": math.nan},
        *({"pattern": pattern} for pattern in ("4:2", "2:2", "0:4", "2-4", "a:b", "2:4:8", " 2:4", "-1:4", "", "02:4")),
        {"pattern": 124},
    ],
    ids=str,
)
def test_wrong_amounts_are_refused(pruner, options):
    with pytest.raises(ValidationError, match=r"amount|sparsity|pattern"):
        pruner(**options)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_pattern_that_does_not_fit_a_layer_is_refused_before_the_work(tiny_folder, pruner):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    pruner(pattern="2:4").check(card)
    with pytest.raises(RecipeError) as refused:
        pruner(pattern="3:6", targets=(r"re:.*\.up_proj",)).check(card)
    assert str(refused.value) == (
        "pattern does not divide the 64 input features of model.layers.0.mlp.up_proj, found '3:6'; "
        "choose another M, or add the layer to ignore"
    )
    pruner(pattern="1:128", targets=(r"re:.*\.down_proj",)).check(card)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_sparsity_that_takes_nothing_of_a_layer_is_refused_before_the_work(tiny_folder, pruner):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    pruner(sparsity=0.2).check(card)
    with pytest.raises(RecipeError, match=r"^sparsity rounds to none of the \d+ weights of model\.layers\."):
        pruner(sparsity=0.0001).check(card)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_layers_that_are_not_there_are_refused_before_the_work(tiny_folder, pruner):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    with pytest.raises(RecipeError, match="matches none of the model's"):
        pruner(sparsity=0.5, targets=("model.layers.9.mlp.up_proj",)).check(card)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_facts_of_the_model_stay_as_they_are(tiny_folder, pruner):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    asked: Masked = pruner(sparsity=0.5)
    assert asked.after(card) == card
    assert asked.bits_per_weight(card) is None
    assert asked.provides() == {"sparsity:unstructured"}
    assert pruner(pattern="4:8").provides() == {"sparsity:4:8"}
