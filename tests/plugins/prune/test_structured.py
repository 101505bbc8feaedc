"""prune.structured on decoders: exact counts, kept weights that are the original ones, and the model with zeros."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from optkit.builtin.huggingface import card_of
from optkit.checkpoints import Checkpoint
from optkit.errors import RecipeError
from optkit.model import Model
from optkit.schemes import SHAPES_ENTRY
from optkit.steps import Limits, Row, StepPlan
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_backends.torch import Torch
from optkit_prune.structured import Structured
from tests.calibrating import context, texts
from tests.shaping import places, refusal

DATA = texts(12, 20, 15)
IDS = DATA.inputs[1]["input_ids"]
IMPORTANCES = ("magnitude", "taylor", "activation", "hessian", "random")
HEAD = 8


def card(model):
    """As it is read from the folder of the model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
    config = model.module.config.to_dict() | {"architectures": ["AnyForCausalLM"]}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return card_of(config, shapes, name="tiny")


def pruned(model, calibration=DATA, **options):
    return Structured(**options).apply(model, context(calibration))


def check_feed(mlp, whole):
    """Its channels are some of the whole one's, in order; those that went are put to zero there."""
    kept = places(mlp.up_proj.weight, whole.up_proj.weight, 0)
    assert kept == sorted(kept)
    assert len(kept) == mlp.intermediate_size == mlp.down_proj.in_features == mlp.gate_proj.out_features
    assert torch.equal(mlp.gate_proj.weight, whole.gate_proj.weight[kept])
    assert torch.equal(mlp.down_proj.weight, whole.down_proj.weight[:, kept])
    gone = [place for place in range(whole.intermediate_size) if place not in kept]
    whole.down_proj.weight[:, gone] = 0


def check_attention(attention, whole, *, groups):
    """Its heads are some of the whole one's, as many of each KV head, or with it; the others are put to zero there."""
    rows = places(attention.q_proj.weight, whole.q_proj.weight, 0)
    heads = [row // HEAD for row in rows[::HEAD]]
    assert rows == [head * HEAD + offset for head in heads for offset in range(HEAD)]
    assert heads == sorted(heads)
    assert attention.q_proj.out_features == attention.o_proj.in_features == len(rows)
    assert torch.equal(attention.o_proj.weight, whole.o_proj.weight[:, rows])
    shared, keys = whole.num_key_value_groups, whole.k_proj.out_features // HEAD
    left = [sum(head // shared == key for head in heads) for key in range(keys)]
    if groups or shared == 1:
        assert set(left) <= {0, shared}
        kept = [key * HEAD + offset for key in range(keys) if left[key] for offset in range(HEAD)]
    else:
        assert len(set(left)) == 1
        kept = list(range(keys * HEAD))
    for layer, old in ((attention.k_proj, whole.k_proj), (attention.v_proj, whole.v_proj)):
        assert torch.equal(layer.weight, old.weight[kept])
    assert attention.num_key_value_groups == len(heads) * HEAD // len(kept)
    gone = [row for row in range(whole.q_proj.out_features) if row not in rows]
    whole.o_proj.weight[:, gone] = 0
    return len(heads), len(kept) // HEAD


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    ratio=st.one_of(st.floats(0.01, 0.95), st.sampled_from([1 / 3, 0.5, 0.67, 0.25, 0.75])),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (5, 5), (6, 2), (6, 3), (8, 2), (8, 8), (8, 1)]),
    parts=st.sampled_from([("ffn",), ("heads",), ("ffn", "heads")]),
    importance=st.sampled_from(IMPORTANCES),
    allocation=st.sampled_from(["uniform", "global"]),
    groups=st.booleans(),
    round_to=st.sampled_from([None, 1, 7, 16]),
)
def test_any_ratio_is_refused_or_gives_the_model_with_zeros(
    tiny_llama, ratio, heads, parts, importance, allocation, groups, round_to
):
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": HEAD, "hidden_size": 120}
    model, whole = tiny_llama(**shape), tiny_llama(**shape).module
    groups = groups and "heads" in parts
    options = {"parts": parts, "ratio": ratio, "importance": importance, "allocation": allocation}
    pruner, before = Structured(**options, kv_groups=groups, round_to=round_to), card(model)
    said = refusal(lambda: pruner.check(before))
    if said is not None:
        assert refusal(lambda: pruner.apply(model, context(DATA))) == said
        return
    result = pruner.apply(model, context(DATA))
    layers = list(zip(result.module.model.layers, whole.model.layers, strict=True))
    if "ffn" in parts:
        step = round_to or 32
        expected = math.floor((1 - ratio) * 128 / step + 0.5) * step
        for layer, old in layers:
            check_feed(layer.mlp, old.mlp)
        widths = [layer.mlp.intermediate_size for layer, _ in layers]
        assert sum(widths) == 2 * expected
        assert not any(width % step for width in widths)
        assert allocation == "global" or widths == [expected, expected]
    if "heads" in parts:
        found = [check_attention(layer.self_attn, old.self_attn, groups=groups) for layer, old in layers]
        assert sum(left for left, _ in found) == 2 * heads[0] - round(2 * heads[0] * ratio)
        assert found[0][0] < heads[0] or found[1][0] < heads[0]
        assert allocation == "global" or found[0] == found[1]
    torch.testing.assert_close(result.module(IDS)[0], whole(IDS)[0], rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in result.module.parameters())
    assert result.module.config._attn_implementation == whole.config._attn_implementation == "sdpa"
    if allocation == "uniform":
        after = pruner.after(before)
        assert (after.linears, after.parameters) == (card(result).linears, card(result).parameters)
        if SHAPES_ENTRY not in result.module.config.to_dict():
            assert after == card(result)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(
    ratio=st.floats(0.05, 0.95),
    tied=st.booleans(),
    importance=st.sampled_from(IMPORTANCES),
    round_to=st.sampled_from([4, 16, 32]),
)
def test_width_goes_from_all_that_is_wide(tiny_llama, ratio, tied, importance, round_to):
    model, whole = tiny_llama(tie_word_embeddings=tied), tiny_llama(tie_word_embeddings=tied).module
    pruner, before = Structured(parts=("width",), ratio=ratio, importance=importance, round_to=round_to), card(model)
    expected = math.floor((1 - ratio) * 64 / round_to + 0.5) * round_to
    if not 0 < expected < 64:
        with pytest.raises(RecipeError, match="of the 64 of width"):
            pruner.check(before)
        return
    module = pruner.apply(model, context(DATA)).module
    kept = places(module.model.embed_tokens.weight, whole.model.embed_tokens.weight, 1)
    assert len(kept) == module.config.hidden_size == module.model.embed_tokens.embedding_dim == expected
    assert (module.lm_head.weight is module.model.embed_tokens.weight) == tied
    for name, tensor in module.state_dict().items():
        old = whole.state_dict()[name]
        for axis, size in enumerate(old.shape):
            writes = name.endswith(("down_proj.weight", "o_proj.weight"))
            if (size == 64 and (axis == 1) != writes) or tensor.dim() == 1:
                old = old.index_select(axis, torch.tensor(kept))
        assert torch.equal(tensor, old), name
    assert module.config.head_dim == 16
    assert pruner.after(before) == card(model)


@pytest.mark.parametrize(
    "options",
    [
        {"parts": ("ffn",), "ratio": 0.5},
        {"parts": ("heads",), "ratio": 0.5},
        {"parts": ("heads",), "ratio": 0.5, "kv_groups": True},
        {"parts": ("width",), "ratio": 0.25, "round_to": 16},
        {"parts": ("ffn", "heads", "width"), "ratio": 0.5},
    ],
    ids=["ffn", "heads", "kv heads", "width", "all"],
)
def test_a_uniform_result_loads_in_transformers_with_the_same_logits(tiny_llama, tmp_path, options):
    result = pruned(tiny_llama(), **options)
    assert result.tags >= {f"pruned:{part}" for part in options["parts"]}
    assert "shape:pruned" not in result.tags
    exact = result.module(IDS)[0]
    save_folder(result, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.config, SHAPES_ENTRY)
    torch.testing.assert_close(plain(IDS)[0], exact, rtol=0, atol=1e-5)
    assert plain.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, IDS.shape[1] + 3)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"num_hidden_layers": 3}, {"parts": ("ffn",), "allocation": "global", "round_to": 8}),
        ({"num_attention_heads": 8, "num_hidden_layers": 3}, {"parts": ("heads",), "allocation": "global"}),
        # Of three heads of 16 Llama's configuration knows nothing where the width is 64.
        ({"num_key_value_heads": 1}, {"parts": ("heads",), "ratio": 0.25}),
    ],
    ids=["ffn", "heads", "odd heads"],
)
def test_a_result_of_several_shapes_loads_through_optkit(tiny_llama, tmp_path, shape, options):
    options = {"ratio": 0.5, "importance": "taylor", **options}
    result = pruned(tiny_llama(**shape), **options)
    assert "shape:pruned" in result.tags
    exact = result.module(IDS)[0]
    save_folder(result, tmp_path)
    loaded = load_folder(tmp_path)
    assert SHAPES_ENTRY in loaded.module.config.to_dict()
    torch.testing.assert_close(loaded.module(IDS)[0], exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3", "SmolLM3"])
@pytest.mark.parametrize("importance", ["activation", "hessian"])
def test_other_decoders_are_pruned_alike(tmp_path, kind, importance):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=60,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    module = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    tags = frozenset({"task:causal-lm", f"arch:{config.model_type}", "weights:float"})
    model = Model(module, None, tags)
    pruner = Structured(parts=("ffn", "heads", "width"), ratio=1 / 3, importance=importance, round_to=8)
    before = card(model)
    result = pruner.apply(model, context(DATA))
    assert pruner.after(before) == card(result)
    assert (module.config.hidden_size, module.config.num_attention_heads, module.config.head_dim) == (32, 4, 8)
    exact = module(IDS)[0]
    save_folder(result, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(IDS)[0], exact, rtol=0, atol=1e-5)


def test_torch_runs_it(tiny_llama, tmp_path):
    result = pruned(tiny_llama(num_hidden_layers=3), parts=("ffn", "heads", "width"), ratio=0.5, allocation="global")
    for name in ("runtime", "weights"):
        (tmp_path / name).mkdir()
    save_folder(result, tmp_path / "weights")
    backend, tokens = Torch(), tuple(IDS[0].tolist())
    backend.compile(load_folder(tmp_path / "weights"), tmp_path / "runtime")
    with backend.open(tmp_path / "runtime", tmp_path / "weights", Limits(2, 64)) as session:
        blocks = tuple(range(-(-64 // session.caps.block_size)))
        found = session.execute(StepPlan((Row(0, tokens, 0, blocks, "all"),))).logits[0]
    exact = result.module(IDS)[0][0].numpy()
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-4


def test_it_can_be_pruned_again(tiny_llama):
    once = pruned(tiny_llama(), parts=("ffn", "heads"), ratio=0.5, allocation="global", importance="magnitude")
    twice = pruned(once, parts=("ffn",), ratio=0.5, round_to=8)
    assert sum(layer.mlp.intermediate_size for layer in twice.module.model.layers) == 64


# --- importances, each against a plain reference


def inputs_of(model, layer):
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for batch in DATA.inputs:
        model.module(**batch)
    hook.remove()
    return torch.cat(seen)


def sensitivities(model, layer):
    """The gradient of each sample's loss by a factor on each input feature of a layer, `[samples, features]`."""
    found = []
    for batch in DATA.inputs:
        layer.weight.requires_grad_(True)
        logits = model.module(**batch)[0]
        loss = cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        layer.weight.requires_grad_(False)
        found.append((gradient * layer.weight).sum(0))
    return torch.stack(found)


def reference(model, importance, index):
    """Of the channels of an FFN."""
    mlp = model.module.model.layers[index].mlp
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    match importance:
        case "magnitude":
            return (gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)).sqrt()
        case "activation":
            return down.abs().sum(0) * inputs_of(model, mlp.down_proj).norm(dim=0)
        case "taylor":
            return sensitivities(model, mlp.down_proj).abs().mean(0)
        case "hessian":
            return sensitivities(model, mlp.down_proj).square().mean(0)


def kept_channels(result, model):
    return [
        places(layer.mlp.up_proj.weight, old.mlp.up_proj.weight, 0)
        for layer, old in zip(result.module.model.layers, model.module.model.layers, strict=True)
    ]


@pytest.mark.parametrize("importance", IMPORTANCES[:4])
def test_the_channels_that_matter_least_go(tiny_llama, importance):
    result = pruned(tiny_llama(), parts=("ffn",), ratio=0.5, importance=importance)
    for index, kept in enumerate(kept_channels(result, tiny_llama())):
        scores = reference(tiny_llama(), importance, index)
        assert set(kept) == set(scores.topk(64).indices.tolist())


@pytest.mark.parametrize("importance", ["taylor", "activation"])
def test_global_allocation_ranks_across_layers(tiny_llama, importance):
    options = {"parts": ("ffn",), "ratio": 0.5, "round_to": 1, "allocation": "global"}
    result = pruned(tiny_llama(), importance=importance, **options)
    scores = [reference(tiny_llama(), importance, index) for index in range(2)]
    if importance == "activation":
        scores = [own / own.mean() for own in scores]
    best = torch.cat(scores).topk(128).indices.tolist()
    kept = [place + 128 * index for index, own in enumerate(kept_channels(result, tiny_llama())) for place in own]
    assert sorted(kept) == sorted(best)
    assert result.module.model.layers[0].mlp.intermediate_size != 64


@pytest.mark.parametrize("importance", ["taylor", "activation"])
def test_heads_are_ranked_within_their_group(tiny_llama, importance):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
    result, model = pruned(tiny_llama(**shape), parts=("heads",), ratio=0.5, importance=importance), tiny_llama(**shape)
    output = model.module.model.layers[0].self_attn.o_proj
    if importance == "taylor":
        scores = sensitivities(model, output).reshape(-1, 8, 8).sum(2).abs().mean(0)
    else:
        scores = (output.weight.abs().sum(0) * inputs_of(model, output).norm(dim=0)).reshape(8, 8).sum(1)
    best = scores.reshape(2, 4).topk(2).indices + torch.tensor([[0], [4]])
    rows = places(
        result.module.model.layers[0].self_attn.q_proj.weight, model.module.model.layers[0].self_attn.q_proj.weight, 0
    )
    assert {row // 8 for row in rows} == set(best.flatten().tolist())


def test_random_is_the_same_for_a_seed(tiny_llama):
    def chosen(seed):
        result = pruned(tiny_llama(), parts=("ffn",), ratio=0.5, importance="random", seed=seed)
        return kept_channels(result, tiny_llama())

    assert chosen(1) == chosen(1) != chosen(2)


@pytest.mark.parametrize("importance", ["activation", "hessian"])
def test_it_goes_on_where_it_was_killed(tiny_llama, tmp_path, importance):
    data = texts(*[12] * 20)

    def dying(done, total, what):
        if what.endswith(("layers.1", "gradients")) and done == (1 if importance == "activation" else 18):
            raise KeyboardInterrupt

    pruner = Structured(parts=("ffn",), ratio=0.5, importance=importance)
    with pytest.raises(KeyboardInterrupt):
        pruner.apply(tiny_llama(), TransformContext(dying, data, Checkpoint(tmp_path)))
    told = []
    again = TransformContext(lambda done, _, what: told.append((done, what)), data, Checkpoint(tmp_path))
    resumed = pruner.apply(tiny_llama(), again).module.state_dict()
    before = [(0, "model.layers.0"), *((done, "gradients") for done in range(16))]
    assert not any(line in before for line in told)
    for name, tensor in pruner.apply(tiny_llama(), context(data)).module.state_dict().items():
        assert torch.equal(resumed[name], tensor)
