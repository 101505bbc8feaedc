"""What reads what in a decoder block, and scales folded in between that leave its output as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from optkit.blockwise import walk
from optkit.calibration import Calibration
from optkit.errors import OptkitError, RecipeError
from optkit.transforms import TransformContext
from optkit_quantize.structure import ARCHITECTURES, Feed, Inputs, fold, fused_groups, inputs_of, layout_of

TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(3))


def decoder(architecture: str, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, **more: Any) -> nn.Module:
    """A random model whose norms and biases are random too."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": head_dim}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model(
        architecture, num_attention_heads=heads, num_key_value_heads=kv_heads, **sizes, **special, **more
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return module


def fold_at_random(module: nn.Module, architecture: str, seed: int, spread: float) -> None:
    random = torch.Generator().manual_seed(seed)
    layout = layout_of({f"arch:{architecture}"}, what="a test", remedy="none")
    for index in range(2):
        for feed in layout.feeds(module, f"model.layers.{index}"):
            channels = len(module.get_submodule(feed.producer).weight)
            fold(module, feed, torch.exp(spread * torch.randn(channels, generator=random)))


def assert_unchanged(module: nn.Module, before: torch.Tensor) -> None:
    after = module(TOKENS)[0]
    assert (after - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_leaves_every_known_architecture_as_it_is(architecture):
    module = decoder(architecture)
    before, weights = module(TOKENS)[0], {name: value.clone() for name, value in module.named_parameters()}
    fold_at_random(module, architecture, 0, 1.0)
    assert_unchanged(module, before)
    changed = {name for name, value in module.named_parameters() if not torch.equal(value, weights[name])}
    parts = {name.split(".")[-2] for name in changed}
    assert parts >= {"input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@given(
    architecture=st.sampled_from(["llama", "qwen2", "qwen3", "gemma"]),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (8, 2)]),
    head_dim=st.sampled_from([4, 8, 16]),
    biases=st.booleans(),
    spread=st.sampled_from([0.0, 0.5, 1.5]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25)
def test_random_scales_leave_the_output_as_it_is(architecture, heads, head_dim, biases, spread, seed):
    more = {"llama": {"mlp_bias": biases}, "qwen2": {}}.get(architecture, {})
    if architecture != "qwen2":
        more["attention_bias"] = biases
    module = decoder(architecture, *heads, head_dim, **more)
    before = module(TOKENS)[0]
    fold_at_random(module, architecture, seed, spread)
    assert_unchanged(module, before)


def test_the_feeds_of_a_block(tiny_llama):
    module = tiny_llama().module
    layout = layout_of({"task:causal-lm", "arch:llama"}, what="a test", remedy="none")
    found = [(feed.producer, feed.readers, feed.scope, feed.copies) for feed in layout.feeds(module, "model.layers.1")]
    block, attention, mlp = "model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp"
    assert found == [
        (f"{block}.input_layernorm", tuple(f"{attention}.{part}_proj" for part in "qkv"), attention, 1),
        (f"{attention}.v_proj", (f"{attention}.o_proj",), f"{attention}.o_proj", 2),
        (f"{block}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), mlp, 1),
        (f"{mlp}.up_proj", (f"{mlp}.down_proj",), f"{mlp}.down_proj", 1),
    ]
    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
    assert layout.linears(module) == linears


def test_query_heads_that_share_values_share_scales():
    feed = Feed("v", ("o",), "o", copies=2, head_size=3)
    scale = torch.tensor([1.0, 2, 3, 4, 5, 6])
    assert feed.spread(scale).tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert feed.shared(torch.arange(12.0)).tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    assert torch.equal(feed.shared(feed.spread(scale)), scale.unsqueeze(1).expand(-1, 2))


@pytest.mark.parametrize("tags", [{"arch:bert"}, {"task:causal-lm"}, {"arch:olmo2", "arch:llamas"}])
def test_an_unknown_architecture_is_refused(tags):
    with pytest.raises(RecipeError, match=r"^AWQ folds scales .* llama, .*, found '(bert|unknown|llamas)'; use other$"):
        layout_of(tags, what="AWQ", remedy="use other")


def test_layers_that_share_a_precision_are_grouped_by_name():
    names = [
        "lm_head",
        *(f"layers.0.self_attn.{part}_proj" for part in "qko"),
        "layers.1.self_attn.v_proj",
        "layers.0.self_attn.v_proj",
        *(f"layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
        *(f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")),
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output.dense",
        "layers.0.mlp.experts.0.gate_proj",
        "layers.0.mlp.experts.0.up_proj",
        "q",
    ]
    assert fused_groups(names) == [
        ("lm_head",),
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
        ("layers.0.self_attn.o_proj",),
        ("layers.1.self_attn.v_proj",),
        ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"),
        ("layers.0.mlp.down_proj",),
        tuple(f"encoder.layer.0.attention.self.{part}" for part in ("query", "key", "value")),
        ("encoder.layer.0.intermediate.dense",),
        ("encoder.layer.0.output.dense",),
        ("layers.0.mlp.experts.0.gate_proj", "layers.0.mlp.experts.0.up_proj"),
        ("q",),
    ]
    assert fused_groups([]) == []


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), sample=st.integers(1, 60), seed=st.integers(0, 2**16)
)
@settings(max_examples=40)
def test_inputs_are_counted_over_all_batches_and_sampled_without_repetition(lengths, sample, seed):
    random = np.random.default_rng(seed)
    batches = [random.normal(size=(1, length, 4)).astype(np.float32) for length in lengths]
    seen, again = Inputs(sum(lengths), sample), Inputs(sum(lengths), sample)
    for batch in batches:
        seen.see(torch.from_numpy(batch))
        again.see(torch.from_numpy(batch))
    vectors = np.concatenate([batch[0] for batch in batches])
    np.testing.assert_allclose(seen.mean.numpy(), np.abs(vectors.astype(np.float64)).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(seen.largest.numpy(), np.abs(vectors).max(0))
    kept = [tuple(vector) for vector in seen.sample.tolist()]
    assert len(kept) == len(set(kept)) == min(sample, len(vectors))
    places = [vectors.tolist().index(list(vector)) for vector in kept]
    assert places == sorted(places)
    assert torch.equal(seen.sample, again.sample)


def test_an_input_that_is_not_finite_is_refused_by_the_layers_name(tiny_llama):
    module = tiny_llama().module
    module.model.layers[0].post_attention_layernorm.weight[3] = float("nan")
    batch = {"input_ids": TOKENS[:1], "attention_mask": torch.ones_like(TOKENS[:1])}
    name = "model.layers.0.mlp.gate_proj"
    block = next(walk(module, TransformContext(lambda *_: None, Calibration((batch,))), [name]))
    with pytest.raises(OptkitError, match=r"^model\.layers\.0\.mlp\.gate_proj: its inputs .* are not finite"):
        inputs_of(block, [name], 12, 8)
