"""prune.wanda against sums written out in float64, and its effect on models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError
from optkit.model import Model
from optkit.transforms import TransformContext
from optkit_prune.magnitude import Magnitude
from optkit_prune.wanda import Wanda
from tests.calibrating import context, distance, texts


class Layer(torch.nn.Module):
    """A model of one linear layer that gets its calibration data as it is."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def problem(rows: int, features: int, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    weight, inputs = random.normal(size=(rows, features)), random.normal(size=(6, 5, features))
    inputs *= np.exp(random.normal(size=features))
    match kind:
        case "zero row":
            weight[-1] = 0
        case "constant":
            weight[:] = 0.5
        case "outlier":
            weight[0, 0] = 1000
        case "outlying input":
            inputs[..., -1] *= 1000
        case "dead":
            inputs[..., ::3] = 0
        case "silent":
            inputs[:] = 0
    return weight.astype(np.float32), inputs.astype(np.float32)


def reference(weight: np.ndarray, inputs: np.ndarray, sparsity: float | None, group: tuple[int, int]) -> np.ndarray:
    """Which weights go: one row, or one group of it, at a time."""
    rows, features = weight.shape
    scores = [
        [abs(float(weight[i, j])) * sum(float(x) ** 2 for x in inputs[..., j].flat) ** 0.5 for j in range(features)]
        for i in range(rows)
    ]
    total, given = round((sparsity or 0) * rows * features), 0
    mask = np.zeros((rows, features), dtype=bool)
    for i in range(rows):
        if sparsity is None:
            kept, size = group
            for start in range(0, features, size):
                ranked = sorted(range(start, start + size), key=lambda j: (scores[i][j], j))
                mask[i, ranked[: size - kept]] = True
        else:
            count = total * (i + 1) // rows - given
            given += count
            mask[i, sorted(range(features), key=lambda j: (scores[i][j], j))[:count]] = True
    return mask


@settings(max_examples=80)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    group=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]),
    sparsity=st.none() | st.floats(0.01, 0.95),
    kind=st.sampled_from(["normal", "zero row", "constant", "outlier", "outlying input", "dead", "silent"]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_reference(rows, groups, group, sparsity, kind, seed):
    weight, inputs = problem(rows, groups * group[1], kind, seed)
    expected = reference(weight, inputs, sparsity, group)
    model = Model(Layer(torch.from_numpy(weight.copy())), None, frozenset({"weights:float"}))
    amount = {"pattern": f"{group[0]}:{group[1]}"} if sparsity is None else {"sparsity": sparsity}
    calibration = Calibration(tuple({"x": torch.from_numpy(batch)[None]} for batch in inputs))
    pruned = Wanda(**amount).apply(model, context(calibration)).module.layer.weight
    np.testing.assert_array_equal(pruned.numpy(), np.where(expected, np.float32(0), weight))


def outlying(model: Model) -> Model:
    """With a few channels of every norm's output far above the others, as in trained models."""
    for block in model.module.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight[::7] *= 10
    return model


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_outputs_move_less_than_by_magnitude(tiny_llama, amount):
    calibration = texts(60, 60, 60)
    tokens = texts(50).inputs[0]["input_ids"]
    exact = outlying(tiny_llama()).module(tokens)[0]
    ours = Wanda(**amount).apply(outlying(tiny_llama()), context(calibration))
    plain = Magnitude(**amount).apply(outlying(tiny_llama()), context(Calibration()))
    assert distance(ours.module, exact, tokens) < 0.8 * distance(plain.module, exact, tokens)


def test_blocks_are_judged_by_what_the_pruned_ones_before_give(tiny_llama):
    calibration = texts(40)
    ours = Wanda(sparsity=0.7).apply(tiny_llama(), context(calibration)).module.model.layers[1]
    second = (r"re:model\.layers\.1\..*",)
    alone = Wanda(sparsity=0.7, targets=second).apply(tiny_llama(), context(calibration)).module.model.layers[1]
    assert not torch.equal(ours.mlp.up_proj.weight, alone.mlp.up_proj.weight)
    first = Wanda(sparsity=0.7, targets=(r"re:model\.layers\.0\..*",)).apply(tiny_llama(), context(calibration))
    then = Wanda(sparsity=0.7, targets=second).apply(first, context(calibration)).module.model.layers[1]
    assert torch.equal(ours.mlp.up_proj.weight, then.mlp.up_proj.weight)


@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"sparsity": 0.6, "allocation": "owl"}])
def test_the_same_twice_and_after_a_kill(tiny_llama, tmp_path, options):
    calibration, pruner = texts(20, 30), Wanda(**options)
    whole = pruner.apply(tiny_llama(), context(calibration)).module.state_dict()
    assert_equal(pruner.apply(tiny_llama(), context(calibration)).module.state_dict(), whole)

    class Killed(Exception):
        pass

    checkpoint, seen = Checkpoint(tmp_path), []

    def until_the_last_block(done: int, total: int, what: str) -> None:
        seen.append(what)
        # With owl the model is walked twice: what is kept is kept in the second walk.
        if what == "model.layers.1" and checkpoint.load("hidden") is not None:
            raise Killed

    with pytest.raises(Killed):
        pruner.apply(tiny_llama(), TransformContext(until_the_last_block, calibration, checkpoint))
    before, seen[:] = len(seen), []
    rest = TransformContext(lambda done, total, what: seen.append(what), calibration, checkpoint)
    assert_equal(pruner.apply(tiny_llama(), rest).module.state_dict(), whole)
    assert "model.layers.0" not in seen
    assert len(seen) < before


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_no_data_is_refused(tiny_llama):
    with pytest.raises(OptkitError, match="no calibration data"):
        Wanda(sparsity=0.5).apply(tiny_llama(), context(Calibration()))
