"""Rotations that spread outliers over all coordinates: Hadamard matrices, exact and orthogonal.

A Hadamard matrix has entries 1 and -1 and orthogonal rows. Those of Sylvester have the orders 2, 4, 8, ...; Paley's two
constructions give q + 1 for primes q of the form 4k + 3, and 2 (q + 1) for those of the form 4k + 1, among them 12, 20,
28 and 36; Kronecker products of two are one again (Horadam, Hadamard Matrices and Their Applications, chapter 2).
"""

from __future__ import annotations

import math
from functools import cache, reduce
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rotation", "hadamard_factors", "paley", "sylvester"]

_ROWS = 4096
# Up to here one matrix is fastest, above several small ones.
_DENSE = 1024
_LARGEST_POWER = 256


class Rotation:
    """An orthogonal matrix `Q = diag(signs) (A x B x ...)`, a Kronecker product that is applied factor by factor.

    All entries have the same magnitude if a Hadamard matrix of order `size` can be built here. Otherwise the factors
    are that of the largest order that divides `size`, and a random orthogonal matrix of the rest.

    Args:
        size: of the vectors, at least 1.
        seed: of the signs, which make one rotation of many, and of the rest.
    """

    def __init__(self, size: int, seed: int) -> None:
        import torch

        random = torch.Generator().manual_seed(seed)
        orders = hadamard_factors(size)
        rest = size // math.prod(orders)
        factors = [hadamard(order) / math.sqrt(order) for order in orders]
        if rest > 1:
            factors.append(_orthogonal(torch.randn(rest, rest, generator=random, dtype=torch.float64)))
        if size <= _DENSE:
            factors = [reduce(torch.kron, factors, torch.ones(1, 1, dtype=torch.float64))]
        self.size, self._factors = size, factors
        self._signs = torch.randint(2, (size,), generator=random).double() * 2 - 1

    def rotate(self, rows: Tensor, gains: Tensor | None = None) -> Tensor:
        """`rows @ diag(gains) @ Q`, computed in float64.

        Args:
            rows: `[..., size]` float.
            gains: `[size]` float, or None: all are 1.

        Returns:
            The same shape, dtype and device.
        """
        import torch

        flat = rows.reshape(-1, self.size)
        # A few rows at a time: an embedding in float64 may not fit.
        wide = None if gains is None else gains.double()
        turned = [
            self._turned(part.double() if wide is None else part.double() * wide).to(rows.dtype)
            for part in torch.split(flat, _ROWS)
        ]
        return torch.cat(turned).reshape(rows.shape)

    def _turned(self, rows: Tensor) -> Tensor:
        rows = rows * self._signs.to(rows.device)
        left = 1
        for factor in self._factors:
            factor, order = factor.to(rows.device), len(factor)
            left *= order
            if left == self.size:
                rows = (rows.reshape(-1, order) @ factor).reshape(len(rows), self.size)
            else:
                rows = (factor.T @ rows.reshape(-1, order, self.size // left)).reshape(len(rows), self.size)
        return rows


def hadamard_factors(size: int) -> list[int]:
    """Orders of Hadamard matrices whose product divides `size` and is as large as the constructions here allow."""
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    bases = _bases(odd, twos)
    used = math.prod(bases)
    left = twos - ((used & -used).bit_length() - 1)
    powers = []
    while left:
        # Halves, so that no factor is larger than it must be.
        step = left if 1 << left <= _LARGEST_POWER else (left + 1) // 2
        powers.append(1 << step)
        left -= step
    return [*bases, *powers]


@cache
def _bases(odd: int, twos: int) -> tuple[int, ...]:
    """Orders by Paley, whose odd parts together divide `odd` and whose powers of two `2**twos`: with the largest odd
    part in all, and of those with the fewest matrices."""
    best: tuple[int, ...] = ()
    for part in (part for part in range(3, odd + 1, 2) if odd % part == 0):
        for power in range(2, twos + 1):
            if _paley_prime(part << power):
                found = (part << power, *_bases(odd // part, twos - power))
                if (_odd_part(found), -len(found)) > (_odd_part(best), -len(best)):
                    best = found
                break
    return best


def _odd_part(orders: tuple[int, ...]) -> int:
    product = math.prod(orders)
    return product // (product & -product)


def hadamard(order: int) -> Tensor:
    """A Hadamard matrix of an order that `hadamard_factors` gives, `[order, order]` float64."""
    return sylvester(order) if order & (order - 1) == 0 else paley(order)


def sylvester(order: int) -> Tensor:
    """The Hadamard matrix of a power of two, `[order, order]` float64."""
    import torch

    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def paley(order: int) -> Tensor:
    """A Hadamard matrix by one of Paley's constructions, `[order, order]` float64.

    Raises:
        ValueError: neither reaches this order with a prime.
    """
    import torch

    q = _paley_prime(order)
    if q is None:
        raise ValueError(f"no construction of Paley has order {order}")
    squares = {value * value % q for value in range(1, q)}
    # 1 for differences that are squares modulo q, -1 for others, 0 on the diagonal.
    character = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    core = character[(index[:, None] - index) % q]
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[1:, 1:], bordered[0, 1:] = core, 1
    if order == q + 1:
        bordered[1:, 0] = -1
        return bordered + torch.eye(order, dtype=torch.float64)
    bordered[1:, 0] = 1
    double = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(bordered, double) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _paley_prime(order: int) -> int | None:
    """The prime q with which a construction of Paley has this order."""
    if order % 4 == 0 and _prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and _prime(half) else None


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _orthogonal(gaussian: Tensor) -> Tensor:
    """The Q of a QR decomposition, evenly distributed over the orthogonal matrices (Mezzadri, math-ph/0609050)."""
    import torch

    q, r = torch.linalg.qr(gaussian)
    even: Tensor = q * r.diagonal().sign()
    return even.contiguous()
