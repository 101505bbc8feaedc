"""quantize.rotate computes what the model did: exact but for rounding, in every architecture that it takes."""

from __future__ import annotations

import math
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.builtin.gguf import GGUF
from optkit.builtin.huggingface import HuggingFace
from optkit.builtin.texts import PythonReference
from optkit.errors import OptkitError, RecipeError
from optkit.evaluate import windows
from optkit.model import Model
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_quantize.hadamard import Rotation, hadamard, hadamard_factors, paley
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.rotate import Rotate

CONTEXT = TransformContext(progress=lambda done, total, what: None)
TOKENS = torch.arange(3, 43)[None]


def matrix(rotation: Rotation) -> torch.Tensor:
    return rotation.rotate(torch.eye(rotation.size, dtype=torch.float64))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@settings(max_examples=50)
@given(size=st.integers(1, 200), seed=st.integers(0, 2**16))
def test_rotations_of_every_size_are_orthogonal(size, seed):
    rotation = Rotation(size, seed)
    turned = matrix(rotation)
    torch.testing.assert_close(turned @ turned.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    if math.prod(hadamard_factors(size)) == size:
        torch.testing.assert_close(turned.abs(), torch.full_like(turned, size**-0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 64, 80, 96, 128, 576, 896, 960, 1152, 1536, 2048, 5120, 12288])
def test_the_sizes_of_models_are_those_of_hadamard_matrices(size):
    factors = hadamard_factors(size)
    assert math.prod(factors) == size
    for order in factors:
        square = hadamard(order)
        assert torch.equal(square.abs(), torch.ones(order, order, dtype=torch.float64))
        assert torch.equal(square @ square.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(("size", "product"), [(7, 1), (14, 2), (100, 20), (21, 1), (72 * 11, 792), (64 * 13, 832)])
def test_other_sizes_use_the_largest_order_that_divides_them(size, product):
    assert math.prod(hadamard_factors(size)) == product


def test_an_order_without_a_construction_is_refused():
    with pytest.raises(ValueError, match="order 18"):
        paley(18)


def test_a_rotation_applied_by_factors_is_its_matrix():
    rotation = Rotation(3072, seed=3)
    turned = matrix(rotation)
    rows, gains = torch.randn(2, 3, 3072), torch.rand(3072)
    expected = (rows.double() * gains.double()) @ turned
    found = rotation.rotate(rows, gains)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    assert not torch.equal(rotation.rotate(rows), Rotation(3072, seed=4).rotate(rows))
    assert torch.equal(rotation.rotate(rows), Rotation(3072, seed=3).rotate(rows))


def test_an_outlier_is_spread_over_all_channels():
    row = torch.zeros(576)
    row[17] = 24.0
    torch.testing.assert_close(Rotation(576, seed=0).rotate(row).abs(), torch.ones(576))


def tiny(architecture: str, tokenizer: object = None, **config) -> Model:
    """A random model whose norms, biases and outliers are those of a trained one."""
    settings = {
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    if architecture == "qwen2":
        del settings["head_dim"]  # it has none of its own
    made = transformers.AutoConfig.for_model(architecture, **settings | config)
    module = transformers.AutoModelForCausalLM.from_config(made).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.2, 3.0)
        elif name.endswith("bias"):
            parameter.normal_()
    module.model.embed_tokens.weight[:, 5] *= 20
    return Model(module, tokenizer, frozenset({"task:causal-lm", f"arch:{architecture}", "weights:float"}))


MODELS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("architecture", "config"), MODELS)
def test_the_rotated_model_gives_the_same_logits(architecture, config, tied, heads):
    model = tiny(architecture, tie_word_embeddings=tied, **config)
    expected = model.module(TOKENS).logits
    before = model.module.model.layers[0].self_attn.v_proj.weight.clone()
    rotated = Rotate(seed=1, heads=heads).apply(model, CONTEXT)
    assert relative(rotated.module(TOKENS).logits, expected) < 1e-5
    assert rotated.tags == model.tags | {"rotated"}
    assert relative(rotated.module.model.layers[0].self_attn.v_proj.weight, before) > 0.5
    norms = [p for name, p in rotated.module.named_parameters() if name.endswith(("layernorm.weight", "norm.weight"))]
    inner = [p for name, p in rotated.module.named_parameters() if "q_norm" in name or "k_norm" in name]
    assert sum(bool((p == 1).all()) for p in norms) == len(norms) - len(inner) == 5


def test_the_weights_are_those_of_the_plainest_reference():
    model = tiny("llama", attention_bias=True)
    attention, mlp = model.module.model.layers[1].self_attn, model.module.model.layers[1].mlp
    gains = model.module.model.layers[1].input_layernorm.weight.double()
    value, output, down = (layer.weight.double() for layer in (attention.v_proj, attention.o_proj, mlp.down_proj))
    biases = attention.v_proj.bias.double(), attention.o_proj.bias.double()
    Rotate(seed=5).apply(model, CONTEXT)
    stream, head = matrix(Rotation(48, 5)), matrix(Rotation(20, 6))
    per_kv, per_query = torch.block_diag(head, head), torch.block_diag(head, head, head, head)
    for found, expected in (
        (attention.v_proj.weight, per_kv.T @ (value * gains) @ stream),
        (attention.v_proj.bias, biases[0] @ per_kv),
        (attention.o_proj.weight, stream.T @ output @ per_query),
        (attention.o_proj.bias, biases[1] @ stream),
        (mlp.down_proj.weight, stream.T @ down),
    ):
        torch.testing.assert_close(found, expected.float())


def test_outliers_of_weights_are_gone():
    model = tiny("llama")
    layer = model.module.model.layers[0].self_attn.q_proj
    layer.weight[:, 5] *= 30

    def peak() -> float:
        return (layer.weight.abs().amax(1) / layer.weight.square().mean(1).sqrt()).mean().item()

    before = peak()
    Rotate().apply(model, CONTEXT)
    assert peak() < 0.6 * before


def test_a_tied_head_stays_tied_where_the_gains_of_the_last_norm_are_equal():
    model = tiny("llama", tie_word_embeddings=True)
    model.module.model.norm.weight.fill_(1.7)
    expected = model.module(TOKENS).logits
    module = Rotate().apply(model, CONTEXT).module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert module.config.tie_word_embeddings
    assert relative(module(TOKENS).logits, expected) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_loads_what_is_saved(tied, tmp_path):
    model = tiny("qwen3", tie_word_embeddings=tied)
    expected, config = model.module(TOKENS).logits, model.module.config.to_dict()
    rotated = Rotate().apply(model, CONTEXT)
    save_folder(rotated, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert relative(loaded(TOKENS).logits, expected) < 1e-5
    assert loaded.config.to_dict() | {"tie_word_embeddings": tied} == config | {
        key: loaded.config.to_dict()[key] for key in ("architectures", "transformers_version", "_name_or_path", "dtype")
    }
    assert relative(load_folder(tmp_path).module(TOKENS).logits, expected) < 1e-5


def test_the_facts_of_the_rotated_model_count_the_untied_head(tmp_path):
    for tied in (True, False):
        folder = tmp_path / str(tied)
        save_folder(tiny("llama", tie_word_embeddings=tied), folder)
        card = HuggingFace(model=str(folder)).inspect()
        assert card.tied_head == tied
        rotated = Rotate().apply(load_folder(folder), CONTEXT).module
        after = Rotate().after(card)
        assert after.parameters == sum(p.numel() for p in rotated.parameters())
        assert not after.tied_head


def test_it_is_deterministic_and_the_seed_matters():
    def weight(seed):
        torch.manual_seed(0)
        return Rotate(seed=seed).apply(tiny("llama"), CONTEXT).module.model.layers[1].mlp.up_proj.weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))


def test_progress_ends_at_its_total():
    told = []
    Rotate().apply(tiny("llama"), TransformContext(lambda *news: told.append(news)))
    assert [news[0] for news in told] == [0, 1, 2, 3]
    assert told[-1] == (3, 3, "done")


@pytest.mark.parametrize("arch", ["bert", "gpt2", "gemma3_text"])
def test_other_architectures_are_refused_before_the_work(arch, tiny_folder):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    Rotate().check(card)
    with pytest.raises(RecipeError, match=f"models of llama, mistral, qwen2, qwen3, found '{arch}'; leave it out"):
        Rotate().check(replace(card, tags=frozenset({"task:causal-lm", f"arch:{arch}"})))


def test_a_weight_that_is_not_finite_is_refused():
    model = tiny("llama")
    model.module.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.mlp\.down_proj\.weight: is not finite"):
        Rotate().apply(model, CONTEXT)


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": "1"}, {"heads": 1}, {"online": True}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        Rotate(**options)


def test_it_is_refused_twice_and_after_what_it_would_undo():
    conflicts = Rotate.conflicts
    for tag in ("rotated", "weights:int4-group", "weights:nf4", "sparsity:2:4"):
        assert any(fnmatchcase(tag, pattern) for pattern in conflicts)
    assert not any(fnmatchcase("weights:float", pattern) for pattern in conflicts)
    assert Rotate.requires == {"weights:float", "task:causal-lm"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model_is_the_same_when_rotated_and_loses_less_to_rounded_activations(smollm2):
    source = GGUF(file=str(smollm2))
    model = source.load()
    judged = windows(model.tokenizer, PythonReference(), 256, 256)

    def logits(module: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([module(torch.tensor([window])).logits[0] for window in judged])

    def divergence(module: torch.nn.Module) -> float:
        found, expected = logits(module).log_softmax(-1), exact.log_softmax(-1)
        return torch.nn.functional.kl_div(found, expected, reduction="batchmean", log_target=True).item()

    exact = logits(model.module)
    plain = divergence(Int8Dynamic().apply(model, CONTEXT).module)
    rotated = Rotate().apply(source.load(), CONTEXT)
    assert relative(logits(rotated.module), exact) < 1e-4
    assert divergence(Int8Dynamic().apply(rotated, CONTEXT).module) < 0.6 * plain
