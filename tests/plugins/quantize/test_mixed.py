"""quantize.mixed: measured sensitivities, the best choice within a budget, and the plan that the user gets."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from optkit.builtin.gguf import GGUF
from optkit.builtin.huggingface import HuggingFace
from optkit.builtin.texts import PythonReference
from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError, RecipeError
from optkit.evaluate import every_window
from optkit.quantized import QuantizedLinear, dequantize
from optkit.schemes import WeightScheme
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_quantize import budget
from optkit_quantize.budget import allocate, bytes_of
from optkit_quantize.candidates import by_gptq, to_nearest
from optkit_quantize.gptq import GPTQ
from optkit_quantize.mixed import PLAN_FILE, Mixed
from optkit_quantize.rounding import round_weight
from optkit_quantize.rtn import RTN
from optkit_quantize.sensitivity import divergences
from tests.calibrating import texts

# --- the knapsack

tables = st.integers(1, 4).flatmap(
    lambda options: st.lists(
        st.tuples(
            st.lists(st.integers(1, 30), min_size=options, max_size=options),
            st.lists(st.floats(0, 1, allow_subnormal=False), min_size=options, max_size=options),
        ),
        min_size=1,
        max_size=5,
    )
)


def every_choice(costs, losses):
    for choice in itertools.product(*(range(len(row)) for row in costs)):
        yield (
            sum(row[pick] for row, pick in zip(costs, choice, strict=True)),
            sum(row[pick] for row, pick in zip(losses, choice, strict=True)),
        )


def totals(costs, losses, choice):
    return (
        sum(row[pick] for row, pick in zip(costs, choice, strict=True)),
        sum(row[pick] for row, pick in zip(losses, choice, strict=True)),
    )


@given(table=tables, limit=st.integers(1, 120))
def test_the_least_loss_within_a_cost_is_that_of_brute_force(table, limit):
    costs, losses = zip(*table, strict=True)
    reachable = [loss for cost, loss in every_choice(costs, losses) if cost <= limit]
    choice = allocate(costs, losses, cost=limit)
    assert (choice is None) == (not reachable)
    if choice is not None:
        cost, loss = totals(costs, losses, choice)
        assert cost <= limit
        assert loss == pytest.approx(min(reachable), abs=1e-12)


@given(table=tables, limit=st.floats(0, 5))
def test_the_least_cost_within_a_loss_is_that_of_brute_force(table, limit):
    costs, losses = zip(*table, strict=True)
    reachable = [cost for cost, loss in every_choice(costs, losses) if loss <= limit * (1 - 1e-9)]
    choice = allocate(costs, losses, loss=limit)
    if reachable:
        cost, loss = totals(costs, losses, choice)
        assert loss <= limit * (1 + 1e-9)
        assert cost <= min(reachable)
    else:
        assert choice is None or totals(costs, losses, choice)[1] <= limit * (1 + 1e-9)


def test_too_many_sums_lose_little_and_keep_the_limit(monkeypatch):
    torch.manual_seed(0)
    costs = (torch.rand(14, 3).sort().values * 1e6).long().tolist()
    losses = torch.rand(14, 3).sort(descending=True).values.tolist()
    limit = sum(sum(row) for row in costs) // 3
    exact = totals(costs, losses, allocate(costs, losses, cost=limit))
    monkeypatch.setattr(budget, "_STATES", 200)
    coarse = totals(costs, losses, allocate(costs, losses, cost=limit))
    assert coarse[0] <= limit
    assert exact[1] <= coarse[1] <= 1.05 * exact[1]


@pytest.mark.parametrize(
    ("text", "count"), [("90 MB", 90_000_000), ("1.5GB", 1_500_000_000), ("2 MiB", 2 << 20), ("0.5 GiB", 1 << 29)]
)
def test_sizes_are_read(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize(
    "text", ["90", "90 mb", "MB", "-1 MB", "0 MB", "1e3 MB", "90  MB", "90 MB ", "1,5 GB", "90 KB"]
)
def test_other_spellings_are_not(text):
    with pytest.raises(ValidationError, match=r"is no size; write a number and MB, GB, MiB or GiB"):
        Mixed(size=text)


# --- measuring

SCHEMES = tuple(WeightScheme(bits, 32, symmetric=True) for bits in (3, 4, 8))


def calibration() -> Calibration:
    return texts(24, 24, 24, vocabulary=280)


def context(checkpoint=None, told=None) -> TransformContext:
    said = (lambda *news: None) if told is None else (lambda *news: told.append(news))
    return TransformContext(said, calibration(), checkpoint or Checkpoint())


def fused(module: nn.Module) -> list[list[str]]:
    groups = []
    for index in range(len(module.model.layers)):
        stem = f"model.layers.{index}"
        groups += [
            [f"{stem}.self_attn.{name}_proj" for name in "qkv"],
            [f"{stem}.self_attn.o_proj"],
            [f"{stem}.mlp.gate_proj", f"{stem}.mlp.up_proj"],
            [f"{stem}.mlp.down_proj"],
        ]
    return groups


def reference(module: nn.Module, names, scheme, calibration) -> float:
    """The whole model in float64, twice."""
    module = module.double()
    exact = [module(**batch).logits[0].softmax(-1) for batch in calibration.inputs]
    for name in names:
        layer = module.get_submodule(name)
        layer.weight.data = dequantize(*round_weight(layer.weight, scheme)).double()
    found = [module(**batch).logits[0].softmax(-1) for batch in calibration.inputs]
    return torch.cat([(p * (p / q).log()).sum(-1) for p, q in zip(exact, found, strict=True)]).mean().item()


@pytest.mark.parametrize("tied", [True, False])
def test_divergences_are_those_of_the_whole_model_in_float64(tiny_llama, tied):
    module = tiny_llama(tie_word_embeddings=tied).module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    groups = [*fused(module), ["lm_head"]]
    measured = divergences(module, groups, SCHEMES, to_nearest(module), context(), tokens=10_000)
    for names, row in zip(groups, measured, strict=True):
        for scheme, found in zip(SCHEMES, row, strict=True):
            expected = reference(tiny_llama(tie_word_embeddings=tied).module, names, scheme, calibration())
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any("forward" in part.__dict__ for part in module.modules())


def test_only_as_many_tokens_are_run_as_asked_for(tiny_llama):
    module, lengths = tiny_llama().module, []
    module.register_forward_pre_hook(
        lambda _, __, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    divergences(module, fused(module)[:1], SCHEMES[:1], to_nearest(module), context(), tokens=48)
    # A few to find the blocks, then two windows as they are and with a group rounded.
    assert lengths[-4:] == [24] * 4
    assert max(lengths[:-4]) <= 8


def test_blocks_before_the_group_are_not_run_again(tiny_llama):
    module, ran = tiny_llama().module, []
    groups = fused(module)[4:]
    measured = divergences(module, groups, SCHEMES, to_nearest(module), context(), 72)
    for layer in module.model.layers[:1]:
        layer.mlp.register_forward_hook(lambda *_: ran.append(1))
    assert divergences(module, groups, SCHEMES, to_nearest(module), context(), 72) == measured
    assert len(ran) == 1 + 3  # to find the blocks, and as they are


def test_a_killed_measurement_goes_on_with_the_group_where_it_was(tiny_llama, tmp_path):
    fresh = tiny_llama().module
    whole = divergences(fresh, fused(fresh), SCHEMES, to_nearest(fresh), context(), 72)

    class Killed(Exception):
        pass

    def die(done, total, what):
        if (done, total) == (32, 72):  # in the middle of the fourth group
            raise Killed

    module = tiny_llama().module
    dying = TransformContext(die, calibration(), Checkpoint(tmp_path))
    with pytest.raises(Killed):
        divergences(module, fused(module), SCHEMES, to_nearest(module), dying, 72)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, tiny_llama().module.state_dict()[name])
    told = []
    resumed = divergences(module, fused(module), SCHEMES, to_nearest(module), context(Checkpoint(tmp_path), told), 72)
    assert resumed == whole
    assert [news[0] for news in told] == list(range(27, 72))


@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_of_gptq_are_its_weights_for_exact_inputs(tiny_llama, symmetric):
    schemes = [WeightScheme(bits, 32, symmetric) for bits in (3, 4)]
    module = tiny_llama().module
    names = [name for names in fused(module) for name in names]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rounding = by_gptq(module, names, schemes, context(), keep_zeros=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    for scheme in schemes:
        own = GPTQ(bits=scheme.bits, granularity="group", group_size=32, symmetric=symmetric)
        module = own.apply(tiny_llama(), context()).module
        for name in names[:3]:  # what comes later has other inputs there
            assert torch.equal(rounding(name, scheme), module.get_submodule(name).dequantized())
        assert not torch.equal(rounding(names[-1], scheme), module.get_submodule(names[-1]).dequantized())


def test_no_data_is_refused(tiny_llama):
    with pytest.raises(OptkitError, match="no calibration data"):
        Mixed(effective_bits=5.0, group_size=32).apply(tiny_llama(), TransformContext(lambda *_: None))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("model.layers.1.mlp.down_proj", r"^model\.layers\.1\.mlp\.down_proj: a weight is not finite"),
        ("lm_head", r"^the model's predictions on the calibration data are not finite; check the model"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused(place, words, tiny_llama):
    model = tiny_llama()
    model.module.get_submodule(place).weight[0, 0] = float("nan")
    with pytest.raises(OptkitError, match=words):
        Mixed(effective_bits=5.0, group_size=32).apply(model, context())


# --- the transform


def mixed(**options) -> Mixed:
    return Mixed(**{"group_size": 32, "algorithm": "rtn", "candidates": (2, 4, 8), **options})


def widths(model) -> dict[str, int]:
    return {n: layer.scheme.bits for n, layer in model.module.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_effective_bits_are_kept_and_fused_layers_share_a_width(tiny_llama, algorithm, symmetric):
    model = mixed(effective_bits=5.5, algorithm=algorithm, symmetric=symmetric).apply(tiny_llama(), context())
    found = widths(model)
    assert len(found) == 14
    assert len(set(found.values())) > 1
    for names in fused(model.module):
        assert len({found[name] for name in names}) == 1
    layers = [layer for layer in model.module.modules() if isinstance(layer, QuantizedLinear)]
    bits = sum(layer.weight.numel() * layer.scheme.bits + layer.scale.numel() * 32 for layer in layers)
    assert bits <= 5.5 * sum(layer.weight.numel() for layer in layers)
    assert {tag for tag in model.tags if tag.startswith("weights:int")} == mixed(
        effective_bits=5.5, symmetric=symmetric
    ).provides()
    assert not isinstance(model.module.lm_head, QuantizedLinear)


def test_the_choice_is_the_best_within_the_budget(tiny_llama):
    model = mixed(effective_bits=5.5).apply(tiny_llama(), context())
    plan = json.loads(model.files[PLAN_FILE])
    sizes = {name.removesuffix(".weight"): tensor.numel() for name, tensor in tiny_llama().module.state_dict().items()}
    costs, losses = [], []
    for row in plan["groups"]:
        weights = sum(sizes[name] for name in row["layers"])
        costs.append([weights * (bits + 1) for bits in (2, 4, 8)])
        losses.append([row["kl"][str(bits)] for bits in (2, 4, 8)])
    weights = sum(sizes[name] for row in plan["groups"] for name in row["layers"])
    best = min(loss for cost, loss in every_choice(costs, losses) if cost <= 5.5 * weights)
    assert plan["kl"] == pytest.approx(best)
    assert plan["budget"] == {"effective_bits": 5.5}
    assert plan["effective_bits"] <= 5.5
    assert {name: row["bits"] for row in plan["groups"] for name in row["layers"]} == widths(model)
    assert model.files[PLAN_FILE].count("\n") == len(plan["groups"]) + 8


@pytest.mark.parametrize("ignore", [("lm_head",), ()])
@pytest.mark.parametrize("tied", [True, False])
def test_a_size_is_that_of_the_stored_tensors(tiny_llama, tmp_path, tied, ignore):
    transform = mixed(size="0.12 MB" if tied and ignore else "0.2 MB", ignore=ignore)
    save_folder(tiny_llama(tie_word_embeddings=tied), tmp_path / "float")
    card = HuggingFace(model=str(tmp_path / "float")).inspect()
    smallest, largest = _range(transform, card)
    transform = mixed(size=f"{(smallest + largest) / 2:.4f} MB", ignore=ignore)
    transform.check(card)
    model = transform.apply(load_folder(tmp_path / "float"), context())
    save_folder(model, tmp_path / "mixed")
    limit = bytes_of(transform.size)
    stored = _tensor_bytes(tmp_path / "mixed")
    assert 0.9 * limit < stored <= limit
    assert json.loads(model.files[PLAN_FILE])["bytes"] == stored
    assert transform.bits_per_weight(card) * card.parameters / 8 == pytest.approx(limit, abs=1)


def _range(transform, card) -> tuple[float, float]:
    with pytest.raises(RecipeError) as refused:
        mixed(size="900 GB", ignore=transform.ignore).check(card)
    words = str(refused.value).split()
    return float(words[words.index("to") - 1]), float(words[words.index("to") + 1])


def _tensor_bytes(folder) -> int:
    [file] = folder.glob("*.safetensors")
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")


def test_a_divergence_makes_the_smallest_model_within_it(tiny_llama):
    loose = mixed(kl=0.5).apply(tiny_llama(), context())
    tight = mixed(kl=0.01).apply(tiny_llama(), context())
    plans = [json.loads(model.files[PLAN_FILE]) for model in (loose, tight)]
    assert plans[0]["kl"] <= 0.5
    assert plans[1]["kl"] <= 0.01
    assert plans[0]["bytes"] < plans[1]["bytes"]


def test_a_divergence_that_no_candidate_reaches_is_refused_with_the_best(tiny_llama):
    with pytest.raises(RecipeError, match=r"^kl: the candidates reach \d\S+ at best, found 1e-12; raise it, or add"):
        mixed(kl=1e-12).apply(tiny_llama(), context())


def test_the_plan_reaches_the_user_in_one_line(tiny_llama):
    told = []
    mixed(effective_bits=5.5).apply(tiny_llama(), context(told=told))
    [line] = [what for _, _, what in told if "bits a weight" in what]
    assert "\n" not in line
    assert line.startswith("5.")
    assert " MB, KL " in line
    assert line.endswith(" bits")
    assert told[-1] == (14, 14, "done")


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_killed_run_ends_with_the_same_model(tiny_llama, tmp_path, algorithm):
    transform = mixed(effective_bits=5.5, algorithm=algorithm)
    whole = transform.apply(tiny_llama(), context())

    class Killed(Exception):
        pass

    def die(done, total, what):
        if total != 72 and done:
            raise Killed

    with pytest.raises(Killed):
        transform.apply(tiny_llama(), TransformContext(die, calibration(), Checkpoint(tmp_path)))
    resumed = transform.apply(tiny_llama(), context(Checkpoint(tmp_path)))
    assert resumed.files == whole.files
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], tensor)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_saved_model_loads_in_transformers_with_the_plan_beside_it(tiny_llama, tmp_path, symmetric):
    model = mixed(effective_bits=5.5, symmetric=symmetric).apply(tiny_llama(), context())
    save_folder(model, tmp_path)
    assert (tmp_path / PLAN_FILE).read_text() == model.files[PLAN_FILE]
    tokens = torch.arange(3, 40)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model.module(tokens).logits, atol=1e-4, rtol=1e-4)
    assert widths(load_folder(tmp_path)) == widths(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"effective_bits": 2.9},
            r"^effective_bits: the candidates reach 3.00 to 9.00, found 2\.9; choose one between",
        ),
        (
            {"effective_bits": 9.5},
            r"^effective_bits: the candidates reach 3.00 to 9.00, found 9\.5; choose one between",
        ),
        ({"size": "1 MB"}, r"^size: the candidates reach 0\.\d+ to 0\.\d+ MB, found '1 MB'; choose one between"),
        ({"size": "0.01 MB"}, r"^size: the candidates reach"),
        ({"effective_bits": 5.0, "group_size": 48}, r"does not divide the"),
    ],
)
def test_budgets_out_of_reach_are_refused_before_the_work(tiny_folder, options, words):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    with pytest.raises(RecipeError, match=words):
        mixed(**options).check(card)


def test_the_size_estimate_follows_the_budget(tiny_folder):
    card = HuggingFace(model=str(tiny_folder)).inspect()
    four, eight = (mixed(effective_bits=bits).bits_per_weight(card) for bits in (4.0, 8.0))
    assert four < eight < mixed(kl=0.1).bits_per_weight(card)
    assert mixed(effective_bits=4.0).forward_passes() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one budget is needed; give effective_bits, size or kl"),
        ({"effective_bits": 4.0, "kl": 0.1}, "exactly one budget"),
        ({"effective_bits": 0.0}, "greater than 0"),
        ({"kl": -1.0}, "greater than 0"),
        ({"kl": 0.1, "candidates": (4,)}, "at least 2"),
        ({"kl": 0.1, "candidates": (4, 4)}, "repeats"),
        ({"kl": 0.1, "candidates": (4, 5)}, "2, 3, 4 or 8"),
        ({"kl": 0.1, "algorithm": "awq"}, "'rtn' or 'gptq'"),
        ({"kl": 0.1, "sensitivity_tokens": 1}, "greater than or equal to 16"),
        ({"kl": 0.1, "bits": 4}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValidationError, match=words):
        Mixed(**options)


# --- the real model


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_beats_uniform_four_bits_at_their_size_on_a_real_model(smollm2):
    source = GGUF(file=str(smollm2))
    model = source.load()
    every = list(every_window(model.tokenizer, PythonReference(), 256))
    judged, learnt = every[:4], every[len(every) // 2 :: 32]
    rows = [torch.tensor([window]) for window in learnt]
    calibration = Calibration(tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows))

    def predictions(module: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([module(torch.tensor([window])).logits[0].log_softmax(-1) for window in judged])

    def divergence(module: nn.Module) -> float:
        return nn.functional.kl_div(predictions(module), exact, reduction="batchmean", log_target=True).item()

    exact = predictions(model.module)
    uniform = divergence(RTN(bits=4, granularity="group", group_size=64).apply(model, context()).module)
    asked = Mixed(effective_bits=4.5, algorithm="rtn", sensitivity_tokens=256)
    chosen = asked.apply(source.load(), TransformContext(lambda *_: None, calibration))
    plan = json.loads(chosen.files[PLAN_FILE])
    assert 4.45 < plan["effective_bits"] <= 4.5
    assert divergence(chosen.module) < uniform
