"""What is compiled from an example is held against its module for other sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from optkit.errors import RecipeError
from optkit_backends.graphs.checking import check_sizes
from optkit_backends.torch.dense import make_dense
from optkit_quantize.int8_dynamic import Int8Dynamic
from tests.calibrating import context, texts


class Tuple(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return (self.module(*inputs)[0],)


OTHERS = [(torch.arange(5).repeat(3, 1), torch.ones(3, 5, dtype=torch.long))]


def compiled(module, off):
    """Gives what the module gives, but for that share of it."""

    def run(*given):
        [found] = module(*given)
        return (found * (1 + off),)

    return run


@pytest.mark.parametrize("rounds", [False, True])
def test_a_graph_may_differ_as_far_as_last_bits_take_its_module(rounds, tiny_bert):
    model = tiny_bert()
    if rounds:
        model = Int8Dynamic().apply(model, context(texts()))
    module = model.module
    make_dense(module)
    tupled = Tuple(module)
    exact = copy.deepcopy(tupled).double()
    check_sizes(tupled, exact, OTHERS, "BertModel", "what somebody compiled")
    wanted = "BertModel: what somebody compiled gives something else for other sizes; some of its Python depends on"
    for off in [0.05] if rounds else [0.05, 0.001]:
        with pytest.raises(RecipeError, match=wanted):
            check_sizes(tupled, compiled(tupled, off), OTHERS, "BertModel", "what somebody compiled")
    assert not any(part._forward_hooks for part in tupled.modules())


def test_a_module_may_compute_in_bfloat16(tiny_bert):
    tupled = Tuple(tiny_bert().module.bfloat16())
    check_sizes(tupled, tupled, OTHERS, "BertModel", "what somebody compiled")


def test_what_a_step_writes_does_not_reach_the_graph():
    class Writes(nn.Module):
        def forward(self, cache):
            cache.add_(1)
            return (cache * 2,)

    given = torch.zeros(3)
    check_sizes(Writes(), Writes(), [(given,)], "Writes", "what somebody compiled")
    assert not given.any()


def test_nothing_that_is_not_a_number_passes(tiny_bert):
    tupled = Tuple(tiny_bert().module)
    with pytest.raises(RecipeError, match="gives something else"):
        check_sizes(tupled, compiled(tupled, float("nan")), OTHERS, "BertModel", "what somebody compiled")
