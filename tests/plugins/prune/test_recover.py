"""prune.recover: what it wins back, what it leaves alone, that it resumes, and its gate."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import GateFailed, OptkitError, RecipeError
from optkit.model import Model
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_prune import distill
from optkit_prune.distill import divergence, held_out, joined, relative_error, schedule
from optkit_prune.layers import Layers
from optkit_prune.lora import Adapted, adapt, merge
from optkit_prune.magnitude import Magnitude
from optkit_prune.recover import Recover
from optkit_prune.structured import Structured
from optkit_prune.svd import SVD
from tests.calibrating import RealModel, context, texts
from tests.shaping import narrow

DATA = texts(*[24] * 60)
METHODS = [{"method": "full", "learning_rate": 1e-3}, {"method": "lora", "learning_rate": 1e-2, "rank": 8}]
LONG = {"steps": 20, "batch_tokens": 96}
QUICK = {"steps": 4, "batch_tokens": 24, "at_least": None}


def learning(baseline, data=DATA, checkpoint=None, lines=None):
    told = (lambda *_: None) if lines is None else lambda *said: lines.append(said)
    return TransformContext(told, data, checkpoint or Checkpoint(), baseline=baseline)


def state(model):
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def won(line):
    """The distances before and after, and the share, of the last line."""
    words = line[2].split()
    return float(words[5]), float(words[7]), float(words[11].rstrip("%")) / 100


# --- distances, samples, order


def test_divergence_is_that_of_distributions():
    ours, wanted = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    p, q = (wanted / 2).softmax(-1), (ours / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(ours, wanted, 2.0), expected)
    assert divergence(wanted, wanted).item() == 0


def test_hidden_states_are_compared_in_proportion_to_their_length():
    wanted = torch.randn(2, 3, 7)
    torch.testing.assert_close(relative_error(1.5 * wanted, wanted), torch.tensor(0.25))


@given(count=st.integers(2, 200), share=st.floats(0.01, 0.5))
def test_samples_to_judge_by_are_never_learnt_from(count, share):
    batches = [{"input_ids": torch.tensor([[index]])} for index in range(count)]
    learnt, judged = held_out(batches, share)
    numbers = [[batch["input_ids"].item() for batch in part] for part in (learnt, judged)]
    assert sorted(numbers[0] + numbers[1]) == list(range(count))
    assert len(numbers[1]) == max(1, round(share * count))
    assert numbers[0]


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9), least=st.integers(1, 60), seed=st.integers(0, 99))
def test_each_sample_comes_once_before_one_comes_again(sizes, least, seed):
    plan = schedule(sizes, 6, least, seed)
    assert plan == schedule(sizes, 6, least, seed)
    order = [place for step in plan for place in step]
    for start in range(0, len(order), len(sizes)):
        part = order[start : start + len(sizes)]
        assert len(set(part)) == len(part)
    for step in plan:
        assert sum(sizes[place] for place in step) >= least
        assert sum(sizes[place] for place in step[:-1]) < least


@given(lengths=st.lists(st.integers(1, 4), max_size=12), most=st.integers(1, 12))
def test_samples_of_one_length_run_together_up_to_a_size(lengths, most):
    samples = [{"input_ids": torch.full((1, length), place)} for place, length in enumerate(lengths)]
    batches = [batch["input_ids"] for batch in joined(samples, most)]
    rows = sorted((row.tolist() for batch in batches for row in batch), key=lambda row: row[0])
    assert rows == [[place] * length for place, length in enumerate(lengths)]
    assert all(batch.numel() <= most for batch in batches if len(batch) > 1)
    for length in set(lengths):
        assert len([b for b in batches if b.shape[1] == length]) == -(-lengths.count(length) // max(1, most // length))


def test_samples_that_run_together_give_the_same_gradients(tiny_llama):
    baseline = tiny_llama()
    pruned = Magnitude(sparsity=0.5).apply(tiny_llama(), context(DATA)).module
    lesson = distill.Lesson(pruned.requires_grad_(True), baseline.module, divergence, "cpu")
    gradients = []
    for most in (1, 96):
        batches = joined(DATA.inputs[:4], most)
        assert len(batches) == {1: 4, 96: 1}[most]
        sum(lesson.between(batch) / len(batches) for batch in batches).backward()
        gradients.append({name: weight.grad for name, weight in pruned.named_parameters()})
        pruned.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


# --- LoRA


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(4, 6, 3, groups=2)], ids=["linear", "convolution"])
def test_what_lora_trains_is_what_is_merged(layer, masked):
    layer = layer.requires_grad_(False)
    layer.weight[0] = 0
    input = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    before = layer(input)
    module = nn.Sequential(layer)
    trained = adapt(module, 2, torch.Generator().manual_seed(0), masked=masked)
    adapted = module[0]
    assert isinstance(adapted, Adapted)
    torch.testing.assert_close(module(input), before)
    assert adapted.bias is layer.bias
    for parameter in trained.values():
        parameter.data.normal_()
    changed = module(input)
    assert not torch.allclose(changed, before)
    merge(module)
    assert module[0] is layer
    torch.testing.assert_close(module(input), changed)
    assert (layer.weight[0] == 0).all() == masked


def test_lora_leaves_the_head_alone_and_names_what_it_trains(tiny_llama):
    module = tiny_llama().module
    trained = adapt(module, 3, torch.Generator().manual_seed(0), masked=False)
    assert {name.rpartition(".")[2] for name in trained} == {"first", "second"}
    assert len(trained) == 2 * 14
    assert type(module.lm_head) is nn.Linear
    with pytest.raises(OptkitError, match="no linear layer that LoRA could change"):
        adapt(nn.Sequential(nn.LayerNorm(4)), 3, torch.Generator(), masked=False)


# --- models


@pytest.mark.parametrize("options", METHODS, ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_what_was_lost_is_won_back(tiny_llama, tiny_bert, tmp_path, options, kind):
    make, lines = (tiny_bert if kind == "bert" else tiny_llama), []
    baseline = make(num_hidden_layers=3)
    untouched = state(baseline)
    pruned = Layers(count=1).apply(make(num_hidden_layers=3), context(DATA))
    model = Recover(**LONG, **options).apply(pruned, learning(baseline, lines=lines))
    before, after, share = won(lines[-1])
    assert 0 < after < 0.9 * before
    assert share == pytest.approx(1 - after / before, abs=2e-3)
    assert lines[-1][:2] == (20, 20)
    assert any(what.startswith("loss ") for _, _, what in lines)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in state(baseline).items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.module.parameters())
    # An ordinary model, which comes back.
    assert not any(isinstance(part, Adapted) for part in model.module.modules())
    save_folder(model, tmp_path)
    ids = DATA.inputs[0]["input_ids"]
    torch.testing.assert_close(load_folder(tmp_path).module(ids)[0], model.module(ids)[0])


@pytest.mark.parametrize("options", METHODS, ids=["full", "lora"])
@pytest.mark.parametrize("pruner", [Magnitude(sparsity=0.6), SVD(ratio=0.3, round_to=4)], ids=["mask", "rank"])
def test_zeros_and_factors_stay(tiny_llama, options, pruner):
    pruned = pruner.apply(tiny_llama(), context(DATA))
    before = state(pruned)
    model = Recover(**QUICK, **options).apply(pruned, learning(tiny_llama()))
    after = state(model)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    projections = [name for name in before if "_proj" in name]
    assert set(changed) >= set(projections)
    assert ("model.norm.weight" in changed) == (options["method"] == "full")
    if "sparsity:unstructured" in model.tags:
        for name in projections:
            assert torch.equal(before[name] == 0, after[name] == 0)
    else:
        assert model.tags >= {"pruned:rank", "shape:pruned"}


def test_without_a_mask_zeros_may_change(tiny_llama):
    pruned = tiny_llama()
    pruned.module.model.layers[0].mlp.up_proj.weight[:64] = 0
    model = Recover(**QUICK, **METHODS[0]).apply(pruned, learning(tiny_llama()))
    assert (model.module.model.layers[0].mlp.up_proj.weight[:64] != 0).any()


@pytest.mark.parametrize("options", METHODS, ids=["full", "lora"])
def test_a_tied_head_stays_tied(tiny_llama, options):
    tied = {"tie_word_embeddings": True, "num_hidden_layers": 3}
    pruned = Layers(count=1).apply(tiny_llama(**tied), context(DATA))
    model = Recover(**QUICK, **options).apply(pruned, learning(tiny_llama(**tied)))
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight


def test_a_model_of_another_width_learns_too(tiny_llama):
    student = tiny_llama(hidden_size=32)
    lines = []
    Recover(**LONG, **METHODS[0]).apply(student, learning(tiny_llama(), lines=lines))
    assert won(lines[-1])[2] > 0.05


def test_layers_of_other_shapes_learn_too(tiny_llama):
    model, lines = tiny_llama(), []
    narrow(model.module.model.layers[0].mlp, 64)
    Recover(**LONG, **METHODS[1]).apply(model, learning(tiny_llama(), lines=lines))
    assert won(lines[-1])[2] > 0.1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_network_of_convolutions_wins_its_accuracy_back(method):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 9, 10),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(4):
        for start in range(0, 1500, 50):
            loss = functional.cross_entropy(network(images[start : start + 50]), labels[start : start + 50])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    network.eval().requires_grad_(False)

    def model():
        return Model(copy.deepcopy(network), None, frozenset({"weights:float"}))

    def accuracy(module):
        return (module(images[1500:]).argmax(-1) == labels[1500:]).float().mean().item()

    pruned = model()
    for layer in (pruned.module[3], pruned.module[6]):
        layer.weight[layer.weight.abs() < layer.weight.abs().quantile(0.8)] = 0
    pruned = Model(pruned.module, None, frozenset({"weights:float", "sparsity:unstructured"}))
    lost = accuracy(network) - accuracy(pruned.module)
    data = Calibration(tuple({"input": images[start : start + 50]} for start in range(0, 1500, 50)))
    options = {"steps": 60, "batch_tokens": 50, "learning_rate": 1e-2, "at_least": 0.5}
    result = Recover(method=method, **options).apply(pruned, learning(model(), data))
    assert lost > 0.05
    assert accuracy(network) - accuracy(result.module) < lost / 2
    assert (result.module[3].weight == 0).float().mean() == pytest.approx(0.8, abs=0.01)


# --- runs


@pytest.mark.parametrize("options", METHODS, ids=["full", "lora"])
def test_the_same_twice_and_after_a_kill(tiny_llama, tmp_path, monkeypatch, options):
    monkeypatch.setattr(distill, "_KEEP_EVERY", 3)
    run = {"steps": 8, "batch_tokens": 24, "at_least": None, **options}

    def pruned():
        return Layers(count=1).apply(tiny_llama(num_hidden_layers=3), context(DATA))

    baseline = tiny_llama(num_hidden_layers=3)
    whole = state(Recover(**run).apply(pruned(), learning(baseline)))

    class Killed(Exception):
        pass

    def dying_at(step):
        def progress(done: int, total: int, what: str) -> None:
            if done == step:
                raise Killed

        return progress

    kept = Checkpoint(tmp_path)
    for step in (2, 7):  # before the first checkpoint, and after the second
        with pytest.raises(Killed):
            Recover(**run).apply(pruned(), TransformContext(dying_at(step), DATA, kept, baseline=baseline))
    lines = []
    resumed = state(Recover(**run).apply(pruned(), learning(baseline, checkpoint=kept, lines=lines)))
    assert next(done for done, _, what in lines if "judging" not in what) == 6
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("options", METHODS, ids=["full", "lora"])
def test_another_seed_gives_another_result(tiny_llama, options):
    found = []
    for seed in (0, 0, 1):
        pruned = Layers(count=1).apply(tiny_llama(), context(DATA))
        found.append(state(Recover(**QUICK, **options, seed=seed).apply(pruned, learning(tiny_llama()))))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0][name], found[2][name])


def test_a_gate_that_is_missed_says_before_after_and_what_was_asked(tiny_llama):
    pruned = Layers(count=1).apply(tiny_llama(num_hidden_layers=3), context(DATA))
    expected = (
        r"^prune\.recover: distance from the original model \d\S+ -> \d\S+ on held-out samples, -?\d+\.\d% won back, "
        r"at least 100\.0% asked for; train longer, prune less, or lower at_least$"
    )
    with pytest.raises(GateFailed, match=expected):
        Recover(steps=4, at_least=1.0).apply(pruned, learning(tiny_llama(num_hidden_layers=3)))


def test_a_model_that_became_worse_fails_unless_there_is_no_gate(tiny_llama):
    harmful = {"steps": 4, "batch_tokens": 24, "learning_rate": 0.5}

    def pruned():
        return Layers(count=1).apply(tiny_llama(num_hidden_layers=3), context(DATA))

    baseline = learning(tiny_llama(num_hidden_layers=3))
    with pytest.raises(GateFailed, match=r"-.*% won back, at least 0\.0% asked for"):
        Recover(**harmful).apply(pruned(), baseline)
    Recover(**harmful, at_least=None).apply(pruned(), baseline)


@pytest.mark.parametrize("options", METHODS, ids=["full", "lora"])
def test_a_gradient_that_is_nan_is_an_error(tiny_llama, options):
    pruned = Layers(count=1).apply(tiny_llama(num_hidden_layers=3), context(DATA))
    broken = tiny_llama(num_hidden_layers=3)
    broken.module.lm_head.weight[0, 0] = math.nan
    with pytest.raises(
        OptkitError, match=r"^step 1 of 4: a gradient is NaN or infinite; lower learning_rate, here 0\.0"
    ):
        Recover(**QUICK, **options).apply(pruned, learning(broken))


def test_what_cannot_be_learnt_is_refused(tiny_llama, tiny_bert):
    options = Recover(**QUICK)
    with pytest.raises(RecipeError, match="answers as the original model does, so that nothing can be won back"):
        options.apply(tiny_llama(), learning(tiny_llama()))
    with pytest.raises(RecipeError, match="one calibration sample is too few"):
        options.apply(tiny_llama(), learning(tiny_llama(), texts(9)))
    with pytest.raises(OptkitError, match="no model to learn from"):
        options.apply(tiny_llama(), context(DATA))
    with pytest.raises(OptkitError, match=r"gives \(1, 24, 16\) where the original model gives \(1, 24, 32\)"):
        options.apply(tiny_bert(hidden_size=16), learning(tiny_bert()))


def test_memory_is_that_of_what_is_trained(tiny_folder):
    from optkit.builtin.huggingface import HuggingFace

    card = HuggingFace(model=str(tiny_folder)).inspect()
    full, lora = Recover().work_bytes(card), Recover(method="lora", rank=1).work_bytes(card)
    assert full - lora > 12 * card.parameters
    assert Recover(steps=400).forward_passes() > 1.9 * Recover().forward_passes()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_model_wins_back_half_of_what_a_fifth_of_its_ffns_was_worth(smollm2):
    real = RealModel(smollm2, samples=128)
    baseline = real.load()
    exact = real.log_perplexity(baseline)
    few = context(Calibration(real.calibration.inputs[::8]))
    pruned = Structured(parts=("ffn",), ratio=0.2, importance="activation").apply(real.load(), few)
    before = real.log_perplexity(pruned)
    after = real.log_perplexity(Recover(steps=60).apply(pruned, learning(baseline, real.calibration)))
    assert after - exact < 0.5 * (before - exact), (exact, before, after)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"learning_rate": 1.0}, {"rank": 8}, {"at_least": 1.5}, {"temperature": 0.0}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        Recover(**options)
