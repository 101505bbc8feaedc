"""Compiles modules in this process with `torch.compile`, once for all sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optkit.locations import cache_root
from optkit_backends.graphs.checking import check_sizes
from optkit_backends.graphs.exporting import exported, impossible
from optkit_backends.graphs.inductor import OPTIONS, keeping_in, quiet, sizes_of_any_kind

__all__ = ["compiled"]


def compiled(
    module: nn.Module,
    example: tuple[Tensor, ...],
    dynamic: Sequence[Sequence[int]],
    others: Iterable[tuple[Tensor, ...]],
    name: str,
) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a module, compiled and checked. It never compiles again: the same kernels run for all sizes.

    What inductor writes stays in the folder `inductor` of optkit's cache, where the next process finds it.

    Args:
        module: in evaluation mode; gives a tuple of tensors.
        example: what it can be called with.
        dynamic: for each tensor the axes whose size may change.
        others: tensors of other sizes.
        name: of the module's class, for errors.

    Raises:
        RecipeError: something of it cannot be exported or compiled, or gives something else for other sizes.
    """
    # A graph of its own, and so code of its own: what has no guards would run for any other module with the same code.
    graph = exported(module, example, dynamic, name).module(check_guards=False)
    # Guards would compile again where they fail, for instance for the strides of an axis of size 1, and take time at
    # every call. The sizes below are checked once instead.
    options: dict[str, Any] = OPTIONS | {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    function: Callable[..., tuple[Tensor, ...]] = torch.compile(graph, fullgraph=True, options=options)
    for tensor, axes in zip(example, dynamic, strict=True):
        for axis in axes:
            torch._dynamo.mark_dynamic(tensor, axis)
    try:
        with torch.inference_mode(), keeping_in(cache_root() / "inductor"), quiet(), sizes_of_any_kind():
            function(*example)
    except Exception as error:  # of many kinds, by what dynamo, inductor or the C++ compiler cannot do
        raise impossible("torch.compile cannot compile it", name, error) from error
    check_sizes(module, function, others, name, "what torch.compile made")
    return function
