"""Which linear layers of a module a profile of its compiled graph can name."""

from __future__ import annotations

import torch
from torch import nn

from optkit_backends.graphs.timing import linears_of


class Pooled(nn.Module):
    """Runs its layers in another order than that of their names, and one of them for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.pooler = nn.Linear(8, 3), nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, input):
        hidden = self.body(input)
        self.pooler(hidden)
        return (self.head(hidden),)


def named(module, **options):
    return [path for path, _ in linears_of(module, lambda: module(torch.ones(2, 4)), **options)]


def test_layers_are_told_in_the_order_in_which_they_run():
    module = Pooled()
    assert linears_of(module, lambda: module(torch.ones(2, 4))) == [("body", 128), ("pooler", 256), ("head", 96)]


def test_layers_that_nothing_depends_on_can_be_left_out():
    assert named(Pooled(), needed=True) == ["body", "head"]
    assert named(Pooled().requires_grad_(False), needed=True) == ["body", "head"]


def test_all_layers_are_told_of_weights_made_in_inference_mode():
    with torch.inference_mode():
        module = Pooled()
    assert named(module, needed=True) == ["body", "pooler", "head"]


def test_what_was_looked_at_runs_as_before():
    module = Pooled()
    wanted = module(torch.ones(2, 4))[0]
    named(module, needed=True)
    assert torch.equal(module(torch.ones(2, 4))[0], wanted)
    assert all(weight.grad is None for weight in module.parameters())
