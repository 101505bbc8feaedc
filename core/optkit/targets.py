"""Which layers a transform works on: exact module paths, `re:` patterns, or `Linear` for every linear layer.

The spelling is that of compressed-tensors' `targets` and `ignore`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

from optkit.errors import RecipeError

__all__ = ["select"]


def select(linears: Collection[str], targets: Iterable[str], ignore: Iterable[str]) -> list[str]:
    """Paths of the linear layers that `targets` names and `ignore` does not, in the model's order.

    Raises:
        RecipeError: a pattern is not a regular expression or matches nothing, or no layer is left. An absent `lm_head`
            may be ignored: it is in the default of `ignore`, and encoders have none.
    """
    chosen = {name for pattern in targets for name in _matching(linears, pattern, "targets")}
    left_out = {name for pattern in ignore for name in _matching(linears, pattern, "ignore")}
    selected = [name for name in linears if name in chosen - left_out]
    if not selected:
        raise RecipeError("targets without ignore leave no layer", remedy="ignore fewer layers")
    return selected


def _matching(linears: Collection[str], pattern: str, option: str) -> list[str]:
    if pattern == "Linear":
        return list(linears)
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            what, remedy = (
                f"{option}: not a regular expression ({error})",
                "after re: write one as Python's re reads it",
            )
            raise RecipeError(what, found=pattern, remedy=remedy) from error
        found = [name for name in linears if expression.match(name)]
    else:
        found = [name for name in linears if name == pattern]
    if not found and not (option == "ignore" and pattern == "lm_head"):
        near = difflib.get_close_matches(pattern.removeprefix("re:"), linears, n=3, cutoff=0.3) or list(linears)[:3]
        raise RecipeError(
            f"{option}: matches none of the model's {len(linears)} linear layers",
            found=pattern,
            remedy=f"near names: {', '.join(near)}",
        )
    return found
