"""Checks that what was compiled from an example does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optkit.errors import RecipeError

__all__ = ["check_sizes"]

_DISTURBED = 1e-5  # about a hundred times what sums in another order change in float32
_AS_FAR = 3  # times
_ALWAYS = 1e-4


@torch.inference_mode()
def check_sizes(
    module: nn.Module,
    compiled: Callable[..., Sequence[Tensor]],
    inputs: Iterable[tuple[Tensor, ...]],
    name: str,
    what: str,
) -> None:
    """Check that a compiled graph gives what its module gives.

    The module itself says how near that has to be: its linear layers and convolutions are disturbed by a thousandth of
    a percent, and the graph may be 3 times as far from it as that takes it, or 1e-4 of the outputs' norm. Where layers
    round their inputs, last bits tip numbers to the other neighbour, and that is a few percent. A size at which the
    disturbance moves the outputs by their own norm tells little: others have to.

    Args:
        module: gives a tuple of tensors.
        compiled: likewise, for the same tensors.
        inputs: of other sizes than those that it was compiled for. They stay as they are.
        name: of the module's class.
        what: was compiled, for example `what torch.jit traced`.

    Raises:
        RecipeError: it gives something else, or fails.
    """
    for given in inputs:
        wanted = module(*_copies(given))
        with _disturbed(module):
            disturbed = module(*_copies(given))
        try:
            found = compiled(*_copies(given))
        except RuntimeError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise _depends(name, f"{what} fails for other sizes: {reason}") from error
        for ours, theirs, near in zip(found, wanted, disturbed, strict=True):
            allowed = max(_AS_FAR * (near - theirs).norm(), _ALWAYS * theirs.norm())
            # Not within also where it is NaN.
            if ours.shape != theirs.shape or not (ours - theirs).norm() <= allowed:
                raise _depends(name, f"{what} gives something else for other sizes")


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Steps write keys and values into what they are given."""
    return [tensor.clone() for tensor in tensors]


@contextmanager
def _disturbed(module: nn.Module) -> Iterator[None]:
    """Multiply each output of a linear layer or a convolution by a number next to 1, while this is open."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (output * (1 + _DISTURBED * torch.randn(output.shape, generator=generator))).to(output.dtype)

    hooks = [
        part.register_forward_hook(disturb) for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _depends(name: str, what: str) -> RecipeError:
    return RecipeError(f"{what}; some of its Python depends on sizes", where=name, remedy="choose another backend")
