"""Sums of inputs, and the factor that passes errors on, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.errors import OptkitError
from optkit.hessians import Hessians, inverse_cholesky


def test_layers_of_one_input_share_one_sum():
    hessians, first, second = Hessians(), torch.randn(1, 5, 200), torch.randn(1, 7, 200)
    for x in (first, second):
        other = torch.randn(1, 3, 8)
        for name in ("q", "k", "v"):
            hessians.see(name, x)
        hessians.see("o", other)
    assert hessians.sharing(["o", "q", "k", "v"]) == [("o",), ("q", "k", "v")]
    x = torch.cat([first[0], second[0]]).double()
    torch.testing.assert_close(hessians.of("k").double(), 2 * x.T @ x / 12, rtol=1e-4, atol=1e-5)


def test_layers_that_share_only_some_inputs_have_their_own_sums():
    hessians, x, y, z = Hessians(), torch.randn(4, 8), torch.randn(6, 8), torch.randn(8)
    hessians.see("a", x)
    hessians.see("b", x)
    hessians.see("a", y)
    hessians.see("b", z)
    hessians.see("b", z)  # called twice with one tensor: counts twice
    assert hessians.sharing(["a", "b"]) == [("a",), ("b",)]
    for name, parts in (("a", [x, y]), ("b", [x, z[None], z[None]])):
        x_ = torch.cat(parts)
        torch.testing.assert_close(hessians.of(name), 2 * x_.T @ x_ / len(x_))


def test_a_layer_that_no_data_reaches_is_named():
    hessians = Hessians()
    hessians.see("a", torch.randn(4, 8))
    with pytest.raises(OptkitError, match=r"^experts\.3: no calibration data reaches this layer; add it to ignore"):
        hessians.sharing(["a", "experts.3"])


def hessian_of(features: int, kind: str, seed: int) -> torch.Tensor:
    inputs = np.random.default_rng(seed).normal(size=({"few": 3}.get(kind, 2 * features), features))
    if kind == "dead":
        inputs[:, ::3] = 0
    elif kind == "silent":
        inputs[:] = 0
    elif kind == "constant":
        inputs[:] = 1
    x = torch.from_numpy(inputs).float()
    return 2 * x.T @ x / len(x)


@settings(max_examples=40)
@given(
    features=st.integers(1, 40),
    kind=st.sampled_from(["normal", "dead", "silent", "few", "constant"]),
    damping=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_the_factor_is_that_of_the_inverse(features, kind, damping, seed):
    hessian = hessian_of(features, kind, seed)
    before = hessian.clone()
    factor = inverse_cholesky(hessian, damping, "layer")
    assert torch.equal(hessian, before)
    assert factor.dtype == torch.float32
    assert torch.equal(factor, factor.tril())
    assert (factor.diagonal() > 0).all()
    mean = hessian.double().diagonal().mean().item()
    damped = hessian.double() + damping * (mean or 1.0) * torch.eye(features)
    wanted = torch.linalg.inv(damped)
    torch.testing.assert_close(factor.double() @ factor.double().T, wanted, rtol=1e-3, atol=1e-5 * wanted.max().item())


@settings(max_examples=20)
@given(features=st.integers(2, 12), seed=st.integers(0, 2**16))
def test_errors_passed_on_by_it_cost_what_its_diagonal_says(features, seed):
    hessian = hessian_of(features, "normal", seed)
    factor = inverse_cholesky(hessian, 0.01, "layer").double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(features)
    for j in range(features):
        # An error of 1 in feature j, and what the later ones change: the least that can remain at the output.
        change = -factor[:, j] / factor[j, j]
        rest = slice(j + 1, features)
        best = torch.linalg.solve(damped[rest, rest], damped[rest, j])
        torch.testing.assert_close(change[rest], best, rtol=1e-3, atol=1e-4)
        change[j] = -1
        cost = change @ damped @ change
        assert cost.item() == pytest.approx(factor[j, j].item() ** -2, rel=1e-3)


@pytest.mark.parametrize("bad", ["nan", "infinite", "indefinite"])
def test_what_no_damping_repairs_is_refused_by_name(bad):
    hessian = torch.diag(torch.tensor([1.0, -9.0] * 8))
    if bad != "indefinite":
        hessian[3, 3] = float("nan" if bad == "nan" else "inf")
    with pytest.raises(OptkitError, match=r"^a\.b: the Hessian of its inputs is not positive definite .*found 0\.01;"):
        inverse_cholesky(hessian, 0.01, "a.b")
