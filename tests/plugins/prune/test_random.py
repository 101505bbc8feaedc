"""prune.random: as much as others prune, by chance, the same every time."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from optkit.calibration import Calibration
from optkit_prune.random import Random
from tests.calibrating import context


def mask(model):
    return {name: tensor == 0 for name, tensor in model.module.state_dict().items() if "proj" in name}


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_a_seed_prunes_the_same_weights_every_time_and_another_seed_others(tiny_llama, amount):
    one, again, other = (
        mask(Random(**amount, seed=seed).apply(tiny_llama(), context(Calibration()))) for seed in (3, 3, 4)
    )
    for name, pruned in one.items():
        assert torch.equal(pruned, again[name])
        both = (pruned & other[name]).float().mean().item()
        assert both == pytest.approx(0.25, abs=0.05)


def test_what_stays_is_as_it_was_and_neither_small_nor_large(tiny_llama):
    before = tiny_llama().module.state_dict()
    model = Random(sparsity=0.5).apply(tiny_llama(), context(Calibration()))
    for name, after in model.module.state_dict().items():
        kept = after != 0
        assert torch.equal(after[kept], before[name][kept])
        if "proj" in name:
            ratio = before[name][kept].abs().mean() / before[name][~kept].abs().mean()
            assert ratio.item() == pytest.approx(1, abs=0.1)


def test_no_other_random_number_is_drawn(tiny_llama):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Random(sparsity=0.5).apply(tiny_llama(), context(Calibration()))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [-1, 1 << 63, 0.5])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValidationError, match="seed"):
        Random(sparsity=0.5, seed=seed)
