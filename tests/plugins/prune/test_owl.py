"""allocation: owl against the paper's formulas written out, and that its zeros add up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from operator import itemgetter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.builtin.huggingface import HuggingFace
from optkit.errors import OptkitError, RecipeError
from optkit.model import Model
from optkit_prune.owl import outlier_ratio, sparsities
from optkit_prune.sparsegpt import SparseGPT
from optkit_prune.wanda import Wanda
from tests.calibrating import context, texts

PRUNERS = [SparseGPT, Wanda]


@given(
    parts=st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), min_size=1, max_size=4),
    threshold=st.floats(1.1, 8),
)
def test_outliers_are_what_is_above_so_many_means(parts, threshold):
    values = [float(np.float32(value)) for part in parts for value in part]
    mean = sum(values) / len(values)
    clear = [value for value in values if not math.isclose(value, threshold * mean, rel_tol=1e-5)]
    ratio = outlier_ratio([torch.tensor(part) for part in parts], threshold)
    least = sum(value > threshold * mean for value in clear) / len(values)
    assert least - 1e-9 <= ratio <= least + (len(values) - len(clear)) / len(values) + 1e-9


@given(
    blocks=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10_000)), min_size=2, max_size=8),
    sparsity=st.floats(0.2, 0.8),
    spread=st.floats(0.001, 0.09),
)
def test_sparsities_average_to_what_was_asked_and_outliers_lower_them(blocks, sparsity, spread):
    ratios, sizes = zip(*blocks, strict=True)
    found = sparsities(ratios, sizes, sparsity, spread)
    assert sum(s * size for s, size in zip(found, sizes, strict=True)) == pytest.approx(sparsity * sum(sizes))
    low, high = min(ratios), max(ratios)
    fewest_first = [share for _, share in sorted(zip(ratios, found, strict=True), key=itemgetter(0))]
    assert fewest_first == sorted(found, reverse=True)
    if high > low:
        assert max(found) - min(found) == pytest.approx(2 * spread)
        best, worst = found[ratios.index(high)], found[ratios.index(low)]
        assert worst - best == pytest.approx(2 * spread)
    else:
        assert found == pytest.approx([sparsity] * len(found))


def test_sizes_of_one_kind_give_the_numbers_of_the_paper_s_code():
    # all_layer_ratio = (r - min) / (max - min) * lambda * 2; density = all_layer_ratio - mean + (1 - sparsity)
    ratios = [0.02, 0.05, 0.03, 0.08]
    scaled = [(ratio - 0.02) / 0.06 * 0.08 * 2 for ratio in ratios]
    density = [part - sum(scaled) / 4 + 0.3 for part in scaled]
    assert sparsities(ratios, [7] * 4, 0.7, 0.08) == pytest.approx([1 - part for part in density])


def uneven(model: Model) -> Model:
    """With ever more outliers in the inputs from block to block."""
    for index, block in enumerate(model.module.model.layers):
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight[: 2 * index] *= 50
    return model


def zeros(model: Model) -> dict[int, list[tuple[int, int]]]:
    """By block, zeros and weights of each of its layers."""
    found: dict[int, list[tuple[int, int]]] = {}
    for name, layer in model.module.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            pair = int((layer.weight == 0).sum()), layer.weight.numel()
            found.setdefault(int(name.split(".")[2]), []).append(pair)
    return found


def share(pairs: list[tuple[int, int]]) -> float:
    return sum(zero for zero, _ in pairs) / sum(size for _, size in pairs)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(pruner=st.sampled_from(PRUNERS), sparsity=st.floats(0.2, 0.8), spread=st.floats(0.01, 0.09))
def test_all_zeros_together_are_as_many_as_asked_and_blocks_differ(tiny_llama, pruner, sparsity, spread):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    asked = pruner(sparsity=sparsity, allocation="owl", owl_spread=spread)
    found = zeros(asked.apply(uneven(tiny_llama(**small)), context(texts(30))))
    total = sum(size for pairs in found.values() for _, size in pairs)
    assert sum(zero for pairs in found.values() for zero, _ in pairs) == round(sparsity * total)
    shares = [share(found[block]) for block in range(3)]
    assert max(shares) - min(shares) == pytest.approx(2 * spread, abs=2e-3)
    assert shares[0] > shares[2]
    for block, pairs in found.items():
        assert [zero / size for zero, size in pairs] == pytest.approx([shares[block]] * len(pairs), abs=2e-3)


def test_the_ratios_are_those_of_the_dense_model(tiny_llama):
    calibration = texts(30, 30)
    model = uneven(tiny_llama())
    inputs: dict[str, list[torch.Tensor]] = {}
    layers: Mapping[str, torch.nn.Linear] = {
        name: layer
        for name, layer in model.module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
    for batch in calibration.inputs:
        model.module(**batch)
    ratios = []
    for block in range(2):
        metric = [
            (layer.weight.double().abs() * torch.cat(inputs[name]).double().norm(dim=0)).flatten()
            for name, layer in layers.items()
            if name.startswith(f"model.layers.{block}.")
        ]
        together = torch.cat(metric)
        ratios.append((together > 3 * together.mean()).double().mean().item())
    assert ratios[0] < ratios[1]
    wanted = sparsities(ratios, [1, 1], 0.6, 0.1)
    options = {"sparsity": 0.6, "allocation": "owl", "owl_threshold": 3.0, "owl_spread": 0.1}
    found = zeros(Wanda(**options).apply(uneven(tiny_llama()), context(calibration)))
    assert [share(found[block]) for block in range(2)] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_blocks_alike_and_a_head_get_what_was_asked(tiny_llama, pruner):
    model = tiny_llama()
    first, second = model.module.model.layers
    second.load_state_dict(first.state_dict())
    pruned = pruner(sparsity=0.5, allocation="owl", owl_threshold=1e4, ignore=()).apply(model, context(texts(30)))
    for block, pairs in zeros(pruned).items():
        assert share(pairs) == pytest.approx(0.5, abs=1e-3), block
    head = pruned.module.lm_head.weight
    assert (head == 0).float().mean().item() == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_what_has_no_blocks_is_refused(tiny_llama, tiny_folder, pruner):
    asked = pruner(sparsity=0.5, allocation="owl")
    with pytest.raises(RecipeError, match="among blocks that follow each other, found '1 in the model'; use uniform"):
        asked.check(replace(HuggingFace(model=str(tiny_folder)).inspect(), layers=1))
    asked.check(HuggingFace(model=str(tiny_folder)).inspect())
    one = pruner(sparsity=0.5, allocation="owl", targets=(r"re:model\.layers\.1\..*",))
    with pytest.raises(OptkitError, match="found '1 with layers to prune'; use uniform, or give more targets"):
        one.apply(tiny_llama(), context(texts(30)))


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, "owl goes with sparsity"),
        ({"sparsity": 0.95}, r"sparsities from 0\.79 to 1\.11; lower it to below 0\.025"),
        ({"sparsity": 0.1}, r"sparsities from -0\.06 to 0\.26; lower it to below 0\.05"),
        ({"sparsity": 0.5, "owl_threshold": 1.0}, "owl_threshold"),
        ({"sparsity": 0.5, "owl_spread": 0.0}, "owl_spread"),
    ],
)
def test_wrong_options_are_refused(pruner, options, message):
    with pytest.raises(ValidationError, match=message):
        pruner(**options, allocation="owl")


@pytest.mark.parametrize("pruner", PRUNERS)
def test_it_runs_the_model_once_more(pruner):
    assert pruner(sparsity=0.5).forward_passes() == 2
    assert pruner(sparsity=0.5, allocation="owl").forward_passes() == 3
