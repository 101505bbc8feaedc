"""prune.structured on convolutional networks, from Python."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from optkit.calibration import Calibration
from optkit.errors import OptkitError, RecipeError
from optkit.model import Model
from optkit.transforms import TransformContext
from optkit_prune.recover import Recover
from optkit_prune.structured import Structured

IMPORTANCES = ("magnitude", "taylor", "activation", "hessian", "random")


class Net(nn.Module):
    """What networks are made of: a skip, a concatenation, a scale, depthwise and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.outer = nn.Conv2d(24, 16, 3, padding=1)
        self.depthwise, self.pointwise = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1, stride=2)
        self.activation, self.up = nn.PReLU(), nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.last, self.scale = nn.Conv2d(24, 12, 3, stride=2), nn.Parameter(torch.rand(1, 16, 1, 1))
        self.hidden, self.head = nn.Linear(12 * 9, 20), nn.Linear(20, 10)

    def forward(self, x):
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(x + self.outer(functional.relu(self.inner_norm(self.inner(x))))) * self.scale
        y = self.up(self.activation(self.pointwise(self.depthwise(x))))
        z = functional.relu(self.last(torch.cat([x, y], 1)))
        return self.head(functional.relu(self.hidden(z.flatten(1))))


CONVOLUTIONS = ("stem", "inner", "outer", "depthwise", "pointwise", "up", "last")
# The stem, what is added to it, and the depthwise convolution that reads both keep the same channels.
POOLS = {"stem": 16, "inner": 24, "pointwise": 32, "up": 8, "last": 12}


def images(rows=4):
    torch.manual_seed(3)
    return TransformContext(lambda *_: None, Calibration(tuple({"x": torch.rand(rows, 1, 8, 8)} for _ in range(3))))


def wrapped(module):
    return Model(module.eval(), None, frozenset({"weights:float"}))


def net():
    torch.manual_seed(0)
    module = Net().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
    return module


def products(module):
    """Multiplications for one image."""
    total = 0

    def count(layer, args, output):
        nonlocal total
        places = args[0][0, 0] if isinstance(layer, nn.ConvTranspose2d) else output[0, 0]
        total += layer.weight.numel() * (places.numel() if places.dim() else 1)

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    module(torch.rand(1, 1, 8, 8))
    for hook in hooks:
        hook.remove()
    return total


def without(module, kept):
    """The outputs with zeros in the place of the channels that went, by the layers that make them."""

    def zero(name):
        def hook(layer, args, output):
            mask = torch.zeros(output.shape[1])
            mask[kept[name]] = 1
            return output * mask[:, None, None]

        return hook

    makers = {"norm": "stem", "outer": "stem", "depthwise": "stem", "inner_norm": "inner"}
    makers |= {"pointwise": "pointwise", "up": "up", "last": "last"}
    hooks = [getattr(module, layer).register_forward_hook(zero(pool)) for layer, pool in makers.items()]
    with torch.no_grad():
        found = module(images().calibration.inputs[0]["x"])
    for hook in hooks:
        hook.remove()
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    ratio=st.floats(0.01, 0.95),
    importance=st.sampled_from(IMPORTANCES),
    allocation=st.sampled_from(["uniform", "global"]),
    round_to=st.sampled_from([None, 2, 4]),
)
def test_any_ratio_is_refused_or_gives_the_network_with_zeros(ratio, importance, allocation, round_to):
    pruner = Structured(
        parts=("channels",), ratio=ratio, importance=importance, allocation=allocation, round_to=round_to
    )
    step = round_to or 1
    expected = {name: int((1 - ratio) * size / step + 0.5) * step for name, size in POOLS.items()}
    if not all(0 < left < POOLS[name] for name, left in expected.items()):
        with pytest.raises(RecipeError, match=r"ratio (leaves|removes) none of the"):
            pruner.apply(wrapped(net()), images())
        return
    whole, module = net(), pruner.apply(wrapped(net()), images()).module
    kept = {}
    for name, size in POOLS.items():
        bias = getattr(module, name).bias if name != "inner" else module.inner_norm.running_mean
        old = getattr(whole, name).bias if name != "inner" else whole.inner_norm.running_mean
        kept[name] = [place for place in range(size) if old[place] in bias]
        assert torch.equal(bias, old[kept[name]])
        assert getattr(module, name).out_channels == len(kept[name])
    assert sum(map(len, kept.values())) == sum(expected.values())
    assert allocation == "global" or {name: len(left) for name, left in kept.items()} == expected
    assert module.depthwise.groups == module.depthwise.in_channels == module.stem.out_channels
    assert module.hidden.in_features == 9 * module.last.out_channels
    assert (module.hidden.out_features, module.head.out_features) == (20, 10)
    assert all(parameter.requires_grad for parameter in module.parameters())
    with torch.no_grad():
        found = module(images().calibration.inputs[0]["x"])
    torch.testing.assert_close(found, without(whole, kept), rtol=0, atol=1e-5)


@settings(max_examples=8)
@given(percent=st.integers(20, 90), allocation=st.sampled_from(["uniform", "global"]))
def test_a_budget_is_kept(percent, allocation):
    limit = products(net()) * percent / 100
    pruner = Structured(parts=("channels",), flops=f"{percent}%", allocation=allocation, importance="hessian")
    result = pruner.apply(wrapped(net()), images())
    assert products(result.module) <= limit
    assert result.tags >= {"pruned:channels"}
    if allocation == "uniform":
        # No pool keeps a channel more without being too large: the largest share that is kept is the budget's.
        shares = [getattr(result.module, name).out_channels / size for name, size in POOLS.items()]
        assert max(shares) - min(shares) < 1 / 8
        assert products(result.module) > 0.7 * limit


def test_a_budget_of_time_is_measured():
    pruner = Structured(parts=("channels",), latency="99%", importance="magnitude", round_to=4)
    result = pruner.apply(wrapped(net()), images(64)).module
    assert result.stem.out_channels < 16


class Shuffled(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), last

    def forward(self, x):
        return self.last(self.first(x))


class Mean(nn.Module):
    """Centres channels: what any one of them is depends on all."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(x - x.mean(1, keepdim=True))


def test_channels_that_the_graph_gets_wrong_are_refused():
    module = net()
    # Beside a parameter of three axes torch-pruning takes a concatenation to be one of tokens.
    module.scale = nn.Parameter(torch.rand(16, 1, 1))
    with pytest.raises(OptkitError, match="the graph of dependencies takes them for channels of"):
        Structured(parts=("channels",), ratio=0.5, importance="magnitude").apply(wrapped(module), images())


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1)), "go through last.0, which has groups of channels"),
        (nn.Conv2d(8, 4, 1, groups=2), "go through last, which has groups of channels"),
        (Mean(), "does not compute what it does with these at zero"),
        (nn.Identity(), "has no convolution whose channels could go"),
    ],
    ids=["group norm", "groups", "mean", "output"],
)
def test_channels_that_cannot_go_are_refused(last, said):
    with pytest.raises(OptkitError, match=said):
        Structured(parts=("channels",), ratio=0.5).apply(wrapped(Shuffled(last)), images())


def test_example_inputs_are_asked_for():
    with pytest.raises(OptkitError, match="there is no calibration data"):
        Structured(parts=("channels",), ratio=0.5, importance="magnitude").apply(
            wrapped(net()), TransformContext(lambda *_: None)
        )


def trained(module, x, y, epochs, rate):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    module.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = functional.cross_entropy(module(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.eval()


def accuracy(module, x, y):
    with torch.no_grad():
        return (module(x).argmax(1) == y).float().mean().item()


class Digits(nn.Sequential):
    """Without what pruning has to look out for, to be trained in a second."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


def test_half_of_the_work_on_digits_costs_less_than_a_point():
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    (x_train, x_test), (y_train, y_test) = x[order].split([1297, 500]), y[order].split([1297, 500])
    torch.manual_seed(0)
    original = trained(Digits(), x_train, y_train, 8, 3e-3)
    before = accuracy(original, x_test, y_test)
    assert before > 0.95
    data = Calibration(tuple({"input": rows} for rows in x_train.split(32)))
    context = TransformContext(lambda *_: None, data, baseline=wrapped(original))
    pruner = Structured(parts=("channels",), flops="50%", importance="hessian")
    pruned = pruner.apply(wrapped(copy.deepcopy(original)), context)
    assert products(pruned.module) <= 0.5 * products(original)
    # By labels, and without any by the original network's answers.
    tuned = trained(copy.deepcopy(pruned.module), x_train, y_train, 4, 1e-3)
    assert accuracy(tuned, x_test, y_test) >= before - 0.01
    recovered = Recover(steps=100, batch_tokens=64).apply(pruned, context).module
    assert accuracy(recovered, x_test, y_test) >= before - 0.01
