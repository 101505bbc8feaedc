"""prune.magnitude: the smallest weights, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit.transforms import TransformContext
from optkit_prune.magnitude import Magnitude

CONTEXT = TransformContext(progress=lambda done, total, what: None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(sparsity=st.floats(0.01, 0.95))
def test_prunes_exactly_the_smallest(tiny_llama, sparsity):
    before = tiny_llama().module.state_dict()
    model = Magnitude(sparsity=sparsity).apply(tiny_llama(), CONTEXT)
    for name, after in model.module.state_dict().items():
        if "proj" not in name:
            assert torch.equal(after, before[name]), name
            continue
        pruned = after == 0
        assert pruned.sum() == round(sparsity * after.numel()), name
        assert torch.equal(after[~pruned], before[name][~pruned])
        if pruned.any() and not pruned.all():
            assert before[name][pruned].abs().max() <= before[name][~pruned].abs().min()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_prunes_the_smallest_of_each_group(tiny_llama, pattern):
    kept, size = map(int, pattern.split(":"))
    before = tiny_llama().module.state_dict()
    model = Magnitude(pattern=pattern).apply(tiny_llama(), CONTEXT)
    for name, after in model.module.state_dict().items():
        if "proj" in name:
            old, new = before[name].reshape(-1, size), after.reshape(-1, size)
            pruned = new == 0
            assert (pruned.sum(-1) == size - kept).all()
            assert torch.equal(new[~pruned], old[~pruned])
            largest_gone = old.abs().masked_fill(~pruned, 0).amax(-1)
            assert (largest_gone <= old.abs().masked_fill(pruned, torch.inf).amin(-1)).all()


def test_ties_do_not_prune_too_much(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[0].mlp.up_proj.weight.fill_(0.25)
    layer = Magnitude(sparsity=0.5).apply(model, CONTEXT).module.model.layers[0].mlp.up_proj
    assert (layer.weight == 0).sum() == layer.weight.numel() // 2


def test_zeros_that_are_there_already_count(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[0].mlp.up_proj.weight[:16] = 0
    layer = Magnitude(sparsity=0.5).apply(model, CONTEXT).module.model.layers[0].mlp.up_proj
    assert (layer.weight == 0).sum() == layer.weight.numel() // 2
