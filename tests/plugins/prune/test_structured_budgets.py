"""prune.structured within budgets: never exceeded, and missed by no more than one step."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit.builtin.huggingface import card_of
from optkit.errors import RecipeError
from optkit.transforms import TransformContext
from optkit_prune.structured import Structured
from tests.calibrating import context, texts

DATA = texts(12, 20)


def card(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.module.state_dict().items()}
    config = model.module.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return card_of(config, shapes, name="tiny")


def size(model):
    return sum(parameter.numel() for parameter in model.module.parameters())


def products(model):
    """Multiplications of the linear layers for a token, a tied head's too."""
    return sum(out * inputs for out, inputs in card(model).linears.values())


def widths(model):
    return [layer.mlp.intermediate_size for layer in model.module.model.layers]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    percent=st.integers(52, 97),
    round_to=st.sampled_from([1, 8, 32]),
    flops=st.booleans(),
    allocation=st.sampled_from(["uniform", "global"]),
    tied=st.booleans(),
)
def test_a_budget_is_kept_and_missed_by_one_step_at_most(tiny_llama, percent, round_to, flops, allocation, tied):
    measure = products if flops else size
    model = tiny_llama(tie_word_embeddings=tied)
    whole, limit = measure(model), measure(model) * percent / 100
    pruner = Structured(
        **{"flops" if flops else "parameters": f"{percent}%"},
        round_to=round_to,
        allocation=allocation,
        importance="magnitude",
    )
    before = card(model)
    least = max(round_to, 7)  # 95% is the most that goes
    if whole - 2 * 3 * 64 * (128 - least) > limit:
        with pytest.raises(RecipeError, match="with the least of ffn it keeps"):
            pruner.check(before)
        return
    pruner.check(before)
    result = pruner.apply(model, context(DATA))
    assert measure(result) <= limit
    # A step of both layers back, and it would be too large.
    assert measure(result) + 2 * 3 * 64 * round_to > limit
    assert pruner.after(before).parameters == size(result)
    assert allocation == "global" or widths(result) == [widths(result)[0]] * 2


@pytest.mark.parametrize("budget", ["100K", "0.1M", "100000"])
def test_a_budget_may_be_a_number(tiny_llama, budget):
    result = Structured(parameters=budget, round_to=1).apply(tiny_llama(), context(DATA))
    assert 100_000 - 2 * 3 * 64 < size(result) <= 100_000


def test_every_part_gives_its_share(tiny_llama):
    pruner = Structured(parts=("ffn", "heads", "width"), flops="30%", round_to=4, importance="magnitude")
    model = tiny_llama(num_attention_heads=8, head_dim=8)
    before, whole = card(model), products(model)
    result = pruner.apply(model, context(DATA))
    assert products(result) <= 0.3 * whole
    assert pruner.after(before) == card(result)
    config = result.module.config
    shares = [config.intermediate_size / 128, config.num_attention_heads / 8, config.hidden_size / 64]
    # Of the largest share that any keeps, each is less than a step away.
    assert max(shares) - min(shares) < 0.25


def timed(tiny_llama, latency):
    told = []
    model = tiny_llama(intermediate_size=1024)
    pruner = Structured(latency=latency, importance="magnitude", round_to=128)
    result = pruner.apply(model, TransformContext(lambda *_: told.append(_[2]), DATA))
    return result, told


def test_a_budget_of_time_takes_as_much_as_it_needs(tiny_llama):
    result, told = timed(tiny_llama, "99%")
    assert widths(result)[0] == widths(result)[1] < 1024
    assert any(line.startswith("time without") for line in told)
    assert told[-1].startswith(f"ffn 2048 -> {2 * widths(result)[0]}; parameters ")


def test_a_budget_of_time_that_nothing_reaches_is_refused(tiny_llama):
    with pytest.raises(RecipeError, match="latency: with the least of ffn it takes"):
        timed(tiny_llama, "0.1%")


def test_a_plan_takes_time_for_work(tiny_llama):
    before = card(tiny_llama())
    after = Structured(latency="80%", round_to=1).after(before)
    kept = Structured(flops="80%", round_to=1).after(before)
    assert after == kept
    assert Structured(latency="1%", round_to=1).after(before).parameters < kept.parameters
    assert Structured(latency="80%").work_bytes(before) > 0
