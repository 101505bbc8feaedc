"""Records modules as programs of `torch.export`, for sizes of any kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from optkit.errors import RecipeError
from optkit_backends.graphs.inductor import quiet, sizes_of_any_kind

__all__ = ["exported", "impossible"]


def exported(
    module: nn.Module, example: tuple[Tensor, ...], dynamic: Sequence[Sequence[int]], name: str
) -> ExportedProgram:
    """The program of a module, with the very tensors of its weights.

    Args:
        module: in evaluation mode; takes `example` by position and gives a tuple of tensors.
        example: what it can be called with.
        dynamic: for each tensor the axes whose size may change.
        name: of the module's class, for errors.

    Raises:
        RecipeError: some of its Python depends on what is in the tensors.
    """
    sizes = tuple(dict.fromkeys(axes, torch.export.Dim.AUTO) for axes in dynamic)
    try:
        with torch.no_grad(), quiet(), sizes_of_any_kind():
            return torch.export.export(module, example, dynamic_shapes=(sizes,))
    except Exception as error:  # whatever the module's own code raises where it meets what is traced
        raise impossible("torch.export cannot record it", name, error) from error


def impossible(what: str, name: str, error: Exception) -> RecipeError:
    """That a compiler cannot do with a module of the class `name`, in one line."""
    reason = str(error).strip().partition("\n")[0]
    return RecipeError(f"{what} ({reason})", where=name, remedy="choose another backend")
