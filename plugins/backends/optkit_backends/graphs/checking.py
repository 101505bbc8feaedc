"""Checks that what was compiled from an example does not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit_backends.graphs.lowering import ROUNDED_TOLERANCE
from optkit_backends.torch.dense import RoundedConv2d, RoundedLinear

__all__ = ["check_sizes"]

# Of the outputs, relative to their norm.
_TOLERANCE = 1e-4


@torch.inference_mode()
def check_sizes(
    module: nn.Module,
    compiled: Callable[..., Sequence[Tensor]],
    inputs: Iterable[tuple[Tensor, ...]],
    name: str,
    what: str,
) -> None:
    """Check that a compiled graph gives what its module gives.

    Args:
        module: gives a tuple of tensors. Where its layers round their inputs, these may round to the other neighbour.
        compiled: likewise, for the same tensors.
        inputs: of other sizes than those that it was compiled for.
        name: of the module's class.
        what: was compiled, for example `what torch.jit traced`.

    Raises:
        RecipeError: it gives something else, or fails.
    """
    rounds = any(isinstance(part, RoundedConv2d | RoundedLinear) for part in module.modules())
    tolerance = ROUNDED_TOLERANCE if rounds else _TOLERANCE
    for given in inputs:
        wanted = module(*given)
        try:
            found = compiled(*given)
        except RuntimeError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise _depends(name, f"{what} fails for other sizes: {reason}") from error
        for ours, theirs in zip(found, wanted, strict=True):
            # Not within also where it is NaN.
            if ours.shape != theirs.shape or not (ours - theirs).norm() <= tolerance * theirs.norm():
                raise _depends(name, f"{what} gives something else for other sizes")


def _depends(name: str, what: str) -> RecipeError:
    return RecipeError(f"{what}; some of its Python depends on sizes", where=name, remedy="choose another backend")
