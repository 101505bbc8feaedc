"""Hessians of linear layers' outputs, and how an error in one weight is made good by others (Frantar et al., Optimal
Brain Compression, arXiv:2208.11580): what algorithms share that change weights one input feature after another.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from optkit.errors import OptkitError

__all__ = ["Hessians", "inverse_cholesky"]

_DAMPINGS = (1, 10, 100)
_PANEL = 192


class Hessians:
    """The matrices `2 X^T X / n` of the inputs of linear layers, over the `n` vectors that each layer got.

    Layers that get one and the same tensor one after another, as the projections of an attention do, share one sum.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._input: Tensor | None = None
        self._readers: list[str] = []

    def see(self, name: str, input: Tensor) -> None:
        """Count in an input `[..., features]` of the layer `name`: what `Block.watch` calls."""
        if input is not self._input or name in self._readers:
            self._add()
            self._input = input
        self._readers.append(name)

    def sharing(self, names: Iterable[str]) -> list[tuple[str, ...]]:
        """Layers in the order given, those of one Hessian together.

        Raises:
            OptkitError: a layer got no input.
        """
        self._add()
        together: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for name in names:
            together.setdefault(tuple(self._sums_of(name)), []).append(name)
        return [tuple(group) for group in together.values()]

    def of(self, name: str) -> Tensor:
        """The Hessian of a layer, `[features, features]` float32.

        Raises:
            OptkitError: it got no input.
        """
        self._add()
        sums = [self._sums[readers] for readers in self._sums_of(name)]
        total, vectors = sums[0][0].clone(), sum(count for _, count in sums)
        for more, _ in sums[1:]:
            total += more
        total *= 2 / vectors
        return total.triu() + total.triu(1).T

    def _sums_of(self, name: str) -> list[tuple[str, ...]]:
        found = [readers for readers in self._sums if name in readers]
        if not found:
            raise OptkitError("no calibration data reaches this layer", where=name, remedy="add it to ignore")
        return found

    def _add(self) -> None:
        """Add the last input to the sum of all that read it."""
        if self._input is None:
            return
        vectors = self._input.detach().reshape(-1, self._input.shape[-1]).float()
        features = vectors.shape[1]
        key = tuple(self._readers)
        total, count = self._sums.get(key) or (torch.zeros(features, features, device=vectors.device), 0)
        # Only the upper triangle, panel by panel: 40% less work.
        for start in range(0, features, _PANEL):
            total[start : start + _PANEL, start:].addmm_(vectors[:, start : start + _PANEL].T, vectors[:, start:])
        self._sums[key] = total, count + len(vectors)
        self._input, self._readers = None, []


def inverse_cholesky(hessian: Tensor, damping: float, name: str) -> Tensor:
    """The lower triangular matrix `C` with `C C^T = H^-1`, `[in, in]` float32, for a damped Hessian.

    An error `e` in the weight of feature `j`, where those before it are fixed, is best made good by taking
    `C[k, j] / C[j, j] * e` from the weight of each feature `k > j`; what then remains at the output is
    `(e / C[j, j])^2`.

    Args:
        hessian: `[in, in]` float, symmetric and positive semidefinite.
        damping: share of the Hessian's mean diagonal that is added to its diagonal. Where it is still not positive
            definite, ten and a hundred times as much are tried.
        name: the layer, for errors.

    Raises:
        OptkitError: it is not positive definite with a hundred times the damping.
    """
    # In float64: calibration data often has far fewer directions than features.
    hessian = hessian.double()
    mean = hessian.diagonal().mean()
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    for factor in _DAMPINGS:
        damped = hessian + identity * (factor * damping * mean)
        # Cholesky's factorization from the last feature to the first, H = R R^T with R upper triangular, spares the
        # inverse of H: C is the inverse of R, transposed.
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if info == 0 and torch.isfinite(lower).all():
            inverse: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return inverse.T.float().contiguous()
    raise OptkitError(
        f"the Hessian of its inputs is not positive definite with {_DAMPINGS[-1]} times the damping",
        where=name,
        found=damping,
        remedy="raise damping, give more calibration data, or add the layer to ignore",
    )
