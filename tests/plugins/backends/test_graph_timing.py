"""Which layers of a module a profile of its compiled graph can name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optkit_backends.graphs.timing import Profiled, products_of
from optkit_backends.torch.timing import timed
from optkit_backends.torchscript.tensors import TorchScriptTensorSession
from optkit_backends.torchscript.tracing import compile_tensors


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
    return [path for path, _, _ in products_of(module, lambda: module(torch.ones(2, 4)), **options)]


def test_layers_are_told_in_the_order_in_which_they_run():
    module = Pooled()
    wanted = [("body", 128, [8, 4]), ("pooler", 256, [8, 8]), ("head", 96, [3, 8])]
    assert products_of(module, lambda: module(torch.ones(2, 4))) == wanted


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


class Convolved(nn.Module):
    """Convolutions of several kinds, and two layers beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=4, bias=False)
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2)
        self.wider = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, image):
        hidden = self.first(image).relu()
        hidden = self.grouped(hidden) + self.shortcut(hidden[..., :-2, :-2])
        return self.head(self.line(self.wider(hidden).flatten(2)).mean(-1))


def traced(module, image, folder):
    compile_tensors(module, {"image": torch.rand(2, *image.shape[1:])}, folder)
    with TorchScriptTensorSession(folder) as session:
        return session.profile({"image": image.numpy()})


def eager(module, image, _):
    times = []
    with timed(module, times, "rest"):
        module(image)
    return times


@pytest.mark.parametrize("profile", [traced, eager])
def test_convolutions_are_named_and_their_operations_counted(profile, tmp_path):
    module, rows = Convolved().eval(), 3
    times = {time.layer: time for time in profile(module, torch.ones(rows, 1, 8, 8), tmp_path)}
    assert {name: times[name].operations for name, _ in module.named_children()} == {
        "first": 2 * rows * (8 * 8) * 8 * 9,
        "grouped": 2 * rows * (3 * 3) * 8 * 2 * 9,
        "shortcut": 2 * rows * (3 * 3) * 8 * 8,
        "wider": 2 * rows * (3 * 3) * 8 * 4 * 4,
        "line": 2 * rows * 34 * 6 * 4 * 3,
        "head": 2 * rows * 6 * 3,
    }
    for name, layer in module.named_children():
        assert times[name].weight_bytes >= layer.weight.nbytes  # eager with those of its bias


def names_of_times(module, products):
    profiled = Profiled(("aten::",), frozenset({"aten::linear"}))
    times = profiled.times(lambda: module(torch.ones(2, 4)), products)
    return [time.layer for time in times if time.kernel == "aten::linear"]


def test_a_graph_may_run_layers_in_another_order():
    module = Pooled()
    products = products_of(module, lambda: module(torch.ones(2, 4)))
    assert names_of_times(module, products[::-1]) == ["body", "pooler", "head"]


@pytest.mark.parametrize("changed", ["fewer", "more", "other"])
def test_no_layer_is_named_where_a_graph_runs_others(changed):
    module = Pooled()
    products = products_of(module, lambda: module(torch.ones(2, 4)))
    others = {"fewer": products[1:], "more": [*products, products[0]], "other": [*products[1:], ("body", 128, [2, 16])]}
    assert names_of_times(module, others[changed]) == ["aten::linear"] * 3
