"""prune.svd against the optimum of Eckart and Young in float64, its budgets, and what runs on top of it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from optkit.builtin.huggingface import HuggingFace
from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError, RecipeError
from optkit.model import Model
from optkit.quantized import quantized_layers
from optkit.shapes import LowRankLinear
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_prune.ranks import allocate, largest_rank, rank_for
from optkit_prune.svd import SVD, principal, root_of
from optkit_quantize.gptq import GPTQ
from optkit_quantize.rtn import RTN
from tests.calibrating import context, distance, texts

DATA = texts(60, 60, 60)
IDS = DATA.inputs[0]["input_ids"]
LAYER = "model.layers.0.mlp.down_proj"


def factored(module):
    return {name: part for name, part in module.named_modules() if isinstance(part, LowRankLinear)}


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# --- one layer


def lone(out: int, inputs: int, rows: int, seed: int) -> tuple[Model, Calibration, torch.Tensor]:
    """A model of one layer, inputs that depend on each other, and these as a matrix."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, out)
    layer.weight.data = torch.randn(out, inputs, generator=generator)
    mixed = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    mixed *= torch.randn(inputs, generator=generator).exp()
    model = Model(nn.Sequential(layer).requires_grad_(False), None, frozenset({"weights:float"}))
    return model, Calibration(({"input": mixed},)), mixed.double()


@settings(max_examples=30)
@given(
    out=st.integers(4, 24),
    inputs=st.integers(4, 24),
    rows=st.sampled_from([3, 10, 200]),
    share=st.floats(0.05, 0.9),
    whiten=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_layer_of_the_rank_is_closer(out, inputs, rows, share, whiten, seed):
    model, data, x = lone(out, inputs, rows, seed)
    ratio = share
    rank = rank_for((out, inputs), ratio, 1)
    if not rank:
        return
    exact = model.module[0].weight.double()
    bias = model.module[0].bias
    layer = SVD(ratio=ratio, round_to=1, whiten=whiten, targets=("0",)).apply(model, context(data)).module[0]
    assert layer.rank == rank
    assert layer[1].bias is bias
    wrong = layer[1].weight.double() @ layer[0].weight.double() - exact
    if whiten:
        left, energy, error = torch.linalg.svdvals(exact @ x.T), (exact @ x.T).norm(), (wrong @ x.T).norm()
    else:
        left, energy, error = torch.linalg.svdvals(exact), exact.norm(), wrong.norm()
    optimum = left[rank:].norm()
    # The factors are float32: their rounding is all that may be added.
    assert error <= optimum * (1 + 1e-6) + 1e-6 * energy
    assert error >= optimum * (1 - 1e-6) - 1e-6 * energy


def test_the_error_is_the_optimum_to_a_millionth():
    model, data, x = lone(48, 96, 500, 0)
    exact = model.module[0].weight.double()
    layer = SVD(ratio=0.5, round_to=1).apply(model, context(data)).module[0]
    error = ((layer[1].weight.double() @ layer[0].weight.double() - exact) @ x.T).norm()
    optimum = torch.linalg.svdvals(exact @ x.T)[layer.rank :].norm()
    assert error.item() == pytest.approx(optimum.item(), rel=1e-6)


@pytest.mark.parametrize("rows", [3, 40])
def test_a_root_is_one(rows):
    x = torch.randn(rows, 12)
    covariance = x.T @ x
    root = root_of(covariance)
    assert root.dtype == torch.float64
    torch.testing.assert_close(root @ root.T, covariance.double(), rtol=1e-5, atol=1e-5)


def test_energies_are_those_of_the_outputs():
    weight, x = torch.randn(5, 8), torch.randn(40, 8).double()
    vectors, energies = principal(weight, root_of(x.T @ x), "a")
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(energies, torch.linalg.svdvals(weight.double() @ x.T).square(), rtol=1e-9, atol=1e-9)
    with pytest.raises(OptkitError, match=r"^a: a weight is not finite"):
        principal(torch.tensor([[float("nan")]]), None, "a")


@given(energy=st.floats(0.01, 0.999), round_to=st.sampled_from([1, 4, 7]), seed=st.integers(0, 2**16))
@settings(max_examples=30)
def test_energy_is_kept_with_the_least_rank(energy, round_to, seed):
    model, data, x = lone(24, 40, 200, seed)
    squares = torch.linalg.svdvals(model.module[0].weight.double() @ x.T).square()
    needed = int((squares.cumsum(0) / squares.sum() < energy).sum()) + 1
    rank = -(-needed // round_to) * round_to
    options = SVD(energy=energy, round_to=round_to)
    if rank * 64 >= 24 * 40:
        with pytest.raises(RecipeError, match="none of 1 layers would shrink"):
            options.apply(model, context(data))
    else:
        assert options.apply(model, context(data)).module[0].rank == rank


# --- ranks


@given(out=st.integers(1, 300), inputs=st.integers(1, 300), round_to=st.integers(1, 20), ratio=st.floats(0.001, 0.95))
def test_ranks_save_what_they_should(out, inputs, round_to, ratio):
    most = largest_rank((out, inputs), round_to)
    assert most % round_to == 0
    assert most * (out + inputs) < out * inputs
    assert (most + round_to) * (out + inputs) >= out * inputs
    rank = rank_for((out, inputs), ratio, round_to)
    assert rank % round_to == 0
    assert rank <= most
    assert rank * (out + inputs) <= (1 - ratio) * out * inputs * (1 + 1e-9)
    assert (rank + round_to) * (out + inputs) > (1 - ratio) * out * inputs * (1 - 1e-9)


@given(
    table=st.lists(
        st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    extra=st.integers(0, 100),
)
def test_allocation_keeps_the_limit_and_is_within_one_step_of_the_best(table, extra):
    costs = [list(itertools.accumulate(cost for cost, _ in row)) for row in table]
    losses = [sorted((loss for _, loss in row), reverse=True) for row in table]
    limit = sum(row[0] for row in costs) + extra
    picks = allocate(costs, losses, limit)
    assert sum(row[pick] for row, pick in zip(costs, picks, strict=True)) <= limit
    loss = sum(row[pick] for row, pick in zip(losses, picks, strict=True))
    best = min(
        sum(row[pick] for row, pick in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(row)) for row in costs))
        if sum(row[pick] for row, pick in zip(costs, choice, strict=True)) <= limit
    )
    assert loss <= best + max(row[0] - row[-1] for row in losses) + 1e-9


# --- models


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(ratio=st.floats(0.01, 0.75), whiten=st.booleans(), encoder=st.booleans())
def test_any_ratio_removes_that_share_at_least_and_runs(tiny_llama, tiny_bert, ratio, whiten, encoder):
    model = (tiny_bert if encoder else tiny_llama)()
    before = {name: part for name, part in model.module.named_modules() if isinstance(part, nn.Linear)}
    result = SVD(ratio=ratio, round_to=4, whiten=whiten).apply(model, context(texts(20, 30)))
    assert set(factored(result.module)) == set(before) - {"lm_head"}
    for name, layer in factored(result.module).items():
        out, inputs = before[name].out_features, before[name].in_features
        assert layer.rank == rank_for((out, inputs), ratio, 4)
        assert (layer.in_features, layer.out_features) == (inputs, out)
    assert torch.isfinite(result.module(IDS)[0]).all()
    assert result.tags >= {"pruned:rank", "shape:pruned"}


def test_whitened_outputs_are_closer_than_plain_ones(tiny_llama):
    exact = tiny_llama().module(IDS)[0]
    ours = SVD(ratio=0.3, round_to=1).apply(tiny_llama(), context(DATA))
    plain = SVD(ratio=0.3, round_to=1, whiten=False).apply(tiny_llama(), context(Calibration()))
    assert distance(ours.module, exact, IDS) < distance(plain.module, exact, IDS)
    assert SVD(ratio=0.3).calibration
    assert not SVD(ratio=0.3, whiten=False).calibration


def flattened(model):
    """With a first block whose matrices are of rank 8, but for one."""
    for name in ("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.o_proj"):
        layer = model.module.model.layers[0].get_submodule(name)
        left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.data = (left[:, :8] * values[:8]) @ right[:8]
    return model


@pytest.mark.parametrize("whiten", [True, False])
def test_a_budget_goes_where_least_is_lost(tiny_llama, whiten):
    model = flattened(tiny_llama())
    exact, before = model.module(IDS)[0], parameters(model.module)
    # What ranks of 8 leave of the four layers, and no more.
    spared = sum(math.prod(shape) - 8 * sum(shape) for shape in [(128, 64), (128, 64), (64, 64), (64, 64)])
    options = SVD(parameters=before - spared, round_to=8, whiten=whiten)
    result = options.apply(model, context(DATA))
    assert {name: layer.rank for name, layer in factored(result.module).items()} == {
        f"model.layers.0.{name}": 8 for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    assert parameters(result.module) == before - spared
    assert distance(result.module, exact, IDS) < 1e-4


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
@given(share=st.floats(0, 1), whiten=st.booleans())
def test_any_budget_is_kept(tiny_llama, share, whiten):
    model = tiny_llama()
    before = parameters(model.module)
    shapes = [(p.out_features, p.in_features) for n, p in model.module.named_modules() if n.endswith("_proj")]
    able = [shape for shape in shapes if largest_rank(shape, 8)]
    least = before - sum(math.prod(shape) - 8 * sum(shape) for shape in able)
    budget = min(before - 1, least + round(share * (before - least)))
    result = SVD(parameters=budget, round_to=8, whiten=whiten).apply(model, context(texts(20)))
    assert parameters(result.module) <= budget
    # No layer of this model could take more than this in one step.
    assert parameters(result.module) > budget - 128 * 64
    assert torch.isfinite(result.module(IDS)[0]).all()


def test_layers_that_would_not_shrink_stay_and_that_is_said(tiny_llama):
    model, lines = flattened(tiny_llama()), []
    exact = model.module(IDS)[0]
    told = TransformContext(lambda *said: lines.append(said), DATA)
    result = SVD(energy=0.9999, round_to=8).apply(model, told)
    names = set(factored(result.module))
    assert names >= {"model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"}
    assert "model.layers.1.mlp.up_proj" not in names
    assert lines[-1][:2] == (14, 14)
    assert lines[-1][2].startswith(f"{len(names)} of 14 layers factored, ")
    assert lines[-1][2].endswith(f"; {14 - len(names)} that would not shrink stay as they are")
    assert distance(result.module, exact, IDS) < 0.1
    with pytest.raises(RecipeError, match=r"none of 1 layers would shrink, found 0\.9999; lower energy"):
        SVD(energy=0.9999, targets=("model.layers.1.mlp.up_proj",)).apply(tiny_llama(), context(DATA))


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"parameters": 75_000}])
def test_the_same_after_a_kill(tiny_llama, tmp_path, options):
    options = SVD(**options, round_to=4)
    whole = options.apply(tiny_llama(), context(DATA)).module.state_dict()

    class Killed(Exception):
        pass

    walks = iter(range(2 if options.parameters else 1))
    seen: list[str] = []

    def at_the_second_block(done: int, total: int, what: str) -> None:
        if what == "model.layers.1" and seen[-1:] != [what] and next(walks, None) is not None:
            seen.append(what)
            raise Killed
        seen.append(what)

    while True:
        try:
            stopped = TransformContext(at_the_second_block, DATA, Checkpoint(tmp_path))
            resumed = options.apply(tiny_llama(), stopped).module.state_dict()
            break
        except Killed:
            seen.append("killed")
    assert seen.count("killed") == (2 if options.parameters else 1)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_card_says_before_what_the_folder_says_after(tiny_llama, tiny_bert, tmp_path, kind):
    make = tiny_bert if kind == "bert" else tiny_llama
    save_folder(make(), tmp_path / "whole")
    options = SVD(ratio=0.4, round_to=4)
    result = options.apply(make(), context(DATA))
    exact = result.module(IDS)[0]
    save_folder(result, tmp_path / "less")
    card = HuggingFace(model=str(tmp_path / "whole")).inspect()
    expected = HuggingFace(model=str(tmp_path / "less")).inspect()
    options.check(card)
    found = options.after(card)
    assert dict(found.linears) == dict(expected.linears)
    assert replace(found, name="", tags=frozenset(), linears={}) == replace(
        expected, name="", tags=frozenset(), linears={}
    )
    assert "shape:pruned" in expected.tags
    torch.testing.assert_close(load_folder(tmp_path / "less").module(IDS)[0], exact)


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"parameters": 80_000}])
def test_where_data_decides_the_card_is_a_fair_estimate(tiny_folder, options):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    found = SVD(**options, round_to=4).after(card)
    assert found.parameters == options.get("parameters", found.parameters) <= card.parameters
    for name, (rank, inputs) in found.linears.items():
        if name.endswith(".0"):
            layer = name.removesuffix(".0")
            assert card.linears[layer] == (found.linears[f"{layer}.1"][0], inputs)
            # An odd multiple: a group size that does not divide all ranks is refused.
            assert rank // 4 % 2 == 1


@pytest.mark.parametrize("quantizer", [RTN(bits=8), GPTQ(bits=8, granularity="group", group_size=16)])
@pytest.mark.parametrize("encoder", [False, True])
def test_both_factors_are_quantized_and_come_back(tiny_llama, tiny_bert, tmp_path, quantizer, encoder):
    model = SVD(ratio=0.2).apply((tiny_bert(hidden_size=64) if encoder else tiny_llama()), context(DATA))
    exact = model.module(IDS)[0]
    names = {f"{name}.{index}" for name in factored(model.module) for index in (0, 1)}
    quantized = quantizer.apply(model, context(DATA))
    assert {name for name, _ in quantized_layers(quantized.module)} == names
    assert distance(quantized.module, exact, IDS) < 0.05
    result = quantized.module(IDS)[0]
    save_folder(quantized, tmp_path)
    again = load_folder(tmp_path)
    torch.testing.assert_close(again.module(IDS)[0], result)
    assert {name for name, _ in quantized_layers(again.module)} == names
    assert json.loads((tmp_path / "config.json").read_text())["optkit_shapes"]


def test_a_quantizer_of_low_rank_layers_goes_on_after_a_kill(tiny_llama, tmp_path):
    quantizer = GPTQ(bits=4, granularity="group", group_size=16)

    def low():
        return SVD(ratio=0.2).apply(tiny_llama(), context(DATA))

    class Killed(Exception):
        pass

    def dying(done: int, total: int, what: str) -> None:
        if what == "model.layers.1":
            raise Killed

    whole = quantizer.apply(low(), context(DATA)).module.state_dict()
    with pytest.raises(Killed):
        quantizer.apply(low(), TransformContext(dying, DATA, Checkpoint(tmp_path)))
    resumed = quantizer.apply(low(), context(DATA, Checkpoint(tmp_path))).module.state_dict()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_no_rank_reaches_is_refused_before_the_work(tiny_llama, tiny_folder, tmp_path):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    with pytest.raises(
        RecipeError, match=r"ratio leaves no multiple of 16 as the rank of .*down_proj, 64 x 128, found 0\.9"
    ):
        SVD(ratio=0.9).check(card)
    with pytest.raises(RecipeError, match="none of 14 layers would shrink, found 512; lower it"):
        SVD(ratio=0.1, round_to=512).check(card)
    for parameters in (1000, card.parameters):
        with pytest.raises(
            RecipeError, match=f"parameters: the model has {card.parameters}, and with the lowest ranks"
        ):
            SVD(parameters=parameters).check(card)
    save_folder(tiny_llama(tie_word_embeddings=True), tmp_path)
    with pytest.raises(RecipeError, match="lm_head is tied to the embedding"):
        SVD(ratio=0.2, ignore=()).check(HuggingFace(model=str(tmp_path)).inspect())
    # One that is not may be factored.
    SVD(ratio=0.2, ignore=()).check(card)


@pytest.mark.parametrize(
    "options", [{}, {"ratio": 0.2, "energy": 0.9}, {"energy": 1.0}, {"ratio": 0.96}, {"parameters": 0}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        SVD(**options)
