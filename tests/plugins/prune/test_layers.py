"""prune.layers against the same model with these blocks skipped, and its choices against plain references."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from optkit.builtin.huggingface import HuggingFace
from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError, RecipeError
from optkit.model import Model
from optkit.transforms import TransformContext
from optkit.weights import save_folder
from optkit_prune.layers import Layers
from optkit_prune.magnitude import Magnitude
from tests.calibrating import context, texts

DATA = texts(20, 30, 25)
IDS = DATA.inputs[0]["input_ids"]


def removed(options, model, calibration=DATA):
    """The model after it, and the numbers of the blocks that went."""
    lines = []
    told = TransformContext(lambda done, total, what: lines.append(what), calibration)
    result = Layers(**options).apply(model, told)
    return result, [int(number) for number in lines[-1].removeprefix("removed ").split(" of ")[0].split(", ")]


def stack(model):
    return model.module.encoder.layer if hasattr(model.module, "encoder") else model.module.model.layers


def without(model, gone):
    """The output with blocks that give what they get."""
    for index in gone:
        stack(model)[index].forward = lambda hidden, *_, **__: hidden
    return model.module(IDS)[0]


def losses(model, gone):
    """The loss of the next token over all of the data without these blocks."""
    for index in gone:
        stack(model)[index].forward = lambda hidden, *_, **__: hidden
    total = 0.0
    for batch in DATA.inputs:
        logits = model.module(batch["input_ids"])[0][0, :-1]
        total += functional.cross_entropy(logits, batch["input_ids"][0, 1:], reduction="sum").item()
    for index in gone:
        del stack(model)[index].forward
    return total


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(
    layers=st.integers(2, 6),
    ratio=st.floats(0.01, 0.95),
    contiguous=st.booleans(),
    by=st.sampled_from(["influence", "perplexity"]),
    encoder=st.booleans(),
)
def test_any_ratio_gives_the_model_with_blocks_skipped(tiny_llama, tiny_bert, layers, ratio, contiguous, by, encoder):
    make = tiny_bert if encoder else tiny_llama
    model, count = make(num_hidden_layers=layers), round(ratio * layers)
    options = {"ratio": ratio, "contiguous": contiguous, "by": "influence" if encoder else by}
    if not 0 < count < layers:
        with pytest.raises(RecipeError, match=f"ratio removes {count} of the model's {layers} blocks"):
            Layers(**options).apply(model, context(DATA))
        return
    result, gone = removed(options, model)
    assert len(gone) == count
    assert not contiguous or gone == list(range(gone[0], gone[0] + count))
    assert len(stack(result)) == result.module.config.num_hidden_layers == layers - count
    assert result.tags >= {"pruned:layers"}
    assert torch.equal(result.module(IDS)[0], without(make(num_hidden_layers=layers), gone))


@pytest.mark.parametrize("contiguous", [False, True])
def test_those_of_least_influence_go(tiny_llama, contiguous):
    _, gone = removed({"count": 2, "contiguous": contiguous}, tiny_llama(num_hidden_layers=6))
    span, changes = (2 if contiguous else 1), []
    hidden = [
        tiny_llama(num_hidden_layers=6).module(**batch, output_hidden_states=True).hidden_states[:-1]
        for batch in DATA.inputs
    ]
    # The last of transformers' hidden states is normalized: that block's output is seen before.
    seen = []
    model = tiny_llama(num_hidden_layers=6).module
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in DATA.inputs:
        model(**batch)
    hidden = [[*states, last] for states, last in zip(hidden, seen, strict=True)]
    for start in range(7 - span):
        pairs = [(states[start][0], states[start + span][0]) for states in hidden]
        cosines = torch.cat([functional.cosine_similarity(x.double(), y.double(), dim=-1) for x, y in pairs])
        changes.append(1 - cosines.mean().item())
    best = sorted(range(len(changes)), key=changes.__getitem__)[: 2 // span]
    assert gone == sorted(start + offset for start in best for offset in range(span))


def test_by_perplexity_each_removal_is_the_best_after_those_before(tiny_llama):
    model = tiny_llama(num_hidden_layers=5)
    expected: list[int] = []
    for _ in range(3):
        left = [index for index in range(5) if index not in expected]
        expected.append(min(left, key=lambda index: losses(model, [*expected, index])))
    _, gone = removed({"count": 3, "by": "perplexity"}, tiny_llama(num_hidden_layers=5))
    assert gone == sorted(expected)


def test_by_perplexity_the_run_that_is_missed_least_goes(tiny_llama):
    model = tiny_llama(num_hidden_layers=6)
    start = min(range(5), key=lambda start: losses(model, [start, start + 1]))
    _, gone = removed({"count": 2, "by": "perplexity", "contiguous": True}, tiny_llama(num_hidden_layers=6))
    assert gone == [start, start + 1]


def test_perplexity_reads_so_many_tokens_and_no_block_twice(tiny_llama):
    model, ran = tiny_llama(num_hidden_layers=4), []
    for layer in stack(model):
        layer.mlp.register_forward_hook(lambda _, args, __: ran.append(args[0].shape[1]))
    removed({"count": 1, "by": "perplexity", "tokens": 16}, model)
    # One of three samples: all blocks, then without each those after it. Besides, checks on 8 or 20 tokens.
    assert ran.count(20) == (4 + 3 + 2 + 1 + 0) + (3 + 3)


def test_the_result_is_an_ordinary_model_of_fewer_layers(tiny_llama, tmp_path):
    model, _ = removed({"count": 2}, tiny_llama(num_hidden_layers=5))
    exact = model.module(IDS)[0]
    assert [layer.self_attn.layer_idx for layer in stack(model)] == [0, 1, 2]
    save_folder(model, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(IDS)[0], exact, rtol=0, atol=0)
    cache = plain(IDS, use_cache=True).past_key_values
    assert len(cache.layers) == 3
    assert plain.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, IDS.shape[1] + 3)


def test_kinds_of_layers_stay_with_their_layers(tmp_path):
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        layer_types=kinds,
        sliding_window=4,
        use_sliding_window=True,
    )
    torch.manual_seed(0)
    module = transformers.Qwen2ForCausalLM(config).eval().requires_grad_(False)
    model, gone = removed({"count": 2}, Model(module, None, frozenset({"task:causal-lm", "weights:float"})))
    kept = [kind for index, kind in enumerate(kinds) if index not in gone]
    assert module.config.layer_types == kept
    exact = module(IDS)[0]
    save_folder(model, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config.layer_types == kept
    torch.testing.assert_close(plain(IDS)[0], exact, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["distilbert", "mpnet"])
def test_other_encoders_lose_blocks_too(kind, tmp_path):
    names = {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4} if kind == "distilbert" else {}
    usual = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, initializer_range=0.2, **(names or usual))
    torch.manual_seed(0)
    module = transformers.AutoModel.from_config(config).eval().requires_grad_(False)
    model, _ = removed({"count": 1}, Model(module, None, frozenset({"task:feature-extraction", "weights:float"})))
    save_folder(model, tmp_path)
    plain = transformers.AutoModel.from_pretrained(tmp_path)
    assert plain.config.num_hidden_layers == 3
    torch.testing.assert_close(plain(IDS)[0], module(IDS)[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "tied", "bert"])
def test_the_card_says_before_what_the_folder_says_after(tiny_llama, tiny_bert, tmp_path, kind):
    make = tiny_bert if kind == "bert" else tiny_llama
    tied = {"tie_word_embeddings": True} if kind == "tied" else {}
    save_folder(make(num_hidden_layers=4, **tied), tmp_path / "whole")
    save_folder(removed({"count": 3}, make(num_hidden_layers=4, **tied))[0], tmp_path / "less")
    card = HuggingFace(model=str(tmp_path / "whole")).inspect()
    expected = HuggingFace(model=str(tmp_path / "less")).inspect()
    options = Layers(count=3)
    options.check(card)
    found = options.after(card)
    # Numbered anew, the names of the blocks that stay are those of the first ones.
    assert replace(found, name="") == replace(expected, name="")


def test_zeros_of_a_mask_stay(tiny_llama):
    masked = Magnitude(sparsity=0.5).apply(tiny_llama(num_hidden_layers=4), context(texts()))
    model, _ = removed({"count": 2}, masked)
    assert all((layer.mlp.up_proj.weight == 0).float().mean() == 0.5 for layer in stack(model))
    assert model.tags >= {"sparsity:unstructured", "pruned:layers"}


def test_perplexity_goes_on_after_a_kill(tiny_llama, tmp_path):
    options = {"count": 2, "by": "perplexity"}
    whole, gone = removed(options, tiny_llama(num_hidden_layers=4))

    class Killed(Exception):
        pass

    calls = itertools.count()

    def dying(done: int, total: int, what: str) -> None:
        if next(calls) == 19:
            raise Killed

    with pytest.raises(Killed):
        Layers(**options).apply(tiny_llama(num_hidden_layers=4), TransformContext(dying, DATA, Checkpoint(tmp_path)))
    lines = []
    told = TransformContext(lambda *what: lines.append(what), DATA, Checkpoint(tmp_path))
    resumed = Layers(**options).apply(tiny_llama(num_hidden_layers=4), told)
    # Two rounds of three samples with 4 and 3 candidates are 21 lines: the second round's last sample is left.
    assert [done for done, _, _ in lines] == [6, 7, 8, 3]
    assert lines[-1][2] == f"removed {gone[0]}, {gone[1]} of 4 blocks"
    assert torch.equal(resumed.module(IDS)[0], whole.module(IDS)[0])


class Numbered(nn.Module):
    """A block that depends on its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden):
        return hidden + self.mix(hidden) / (4 - self.layer_idx)


def test_blocks_that_depend_on_their_number_are_refused():
    class Odd(nn.Module):
        config = transformers.LlamaConfig(num_hidden_layers=4)

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Numbered(number) for number in range(4))

        def forward(self, input, use_cache=False):
            for block in self.blocks:
                input = block(input)
            return input

    model = Model(Odd().requires_grad_(False), None, frozenset({"weights:float"}))
    rows = Calibration(({"input": torch.randn(1, 5, 8)},))
    with pytest.raises(OptkitError, match="they depend on their number"):
        Layers(count=1).apply(model, context(rows))


def test_what_has_no_blocks_is_refused(tiny_llama, tiny_folder):
    plain = Model(nn.Sequential(nn.Linear(4, 4)), None, frozenset({"weights:float"}))
    with pytest.raises(OptkitError, match="has no list of blocks"):
        Layers(count=1).apply(plain, context(Calibration(({"input": torch.ones(1, 4)},))))
    with pytest.raises(OptkitError, match="no calibration data"):
        Layers(count=1).apply(tiny_llama(), context(Calibration()))
    card = HuggingFace(model=str(tiny_folder)).inspect()
    with pytest.raises(RecipeError, match="its layers are not in 3 blocks"):
        Layers(count=1).check(replace(card, layers=3))


def test_options_that_do_not_fit_are_refused_before_the_work(tiny_folder, tiny_encoder):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    with pytest.raises(RecipeError, match="count removes 2 of the model's 2 blocks, found 2; remove 1 to 1"):
        Layers(count=2).check(card)
    with pytest.raises(RecipeError, match="ratio removes 0 of"):
        Layers(ratio=0.2).check(card)
    with pytest.raises(RecipeError, match="predicts no next token"):
        Layers(count=1, by="perplexity").check(HuggingFace(model=str(tiny_encoder)).inspect())


@pytest.mark.parametrize(
    "options",
    [{}, {"count": 1, "ratio": 0.5}, {"count": 0}, {"ratio": 1.0}, {"count": 1, "tokens": 99}, {"ratio": math.nan}],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        Layers(**options)
