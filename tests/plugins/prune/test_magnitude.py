"""prune.magnitude: exact sparsity, the smallest weights, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit.transforms import TransformContext
from optkit_prune.magnitude import Magnitude

CONTEXT = TransformContext(progress=lambda done, total, what: None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
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


def test_ties_do_not_prune_too_much(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[0].mlp.up_proj.weight.fill_(0.25)
    layer = Magnitude(sparsity=0.5).apply(model, CONTEXT).module.model.layers[0].mlp.up_proj
    assert (layer.weight == 0).sum() == layer.weight.numel() // 2


def test_only_the_targets(tiny_llama):
    model = Magnitude(sparsity=0.5, targets=(r"re:.*\.down_proj",)).apply(tiny_llama(), CONTEXT)
    sparse = [name for name, tensor in model.module.state_dict().items() if (tensor == 0).float().mean() > 0.4]
    assert sparse == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]


@pytest.mark.parametrize("sparsity", [0.0, 0.96, -1.0, True])
def test_wrong_options_are_refused(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        Magnitude(sparsity=sparsity)
