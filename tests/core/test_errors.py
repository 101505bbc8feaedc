"""One line: where, what, what was found, what to do."""

from __future__ import annotations

import pytest

from optkit import errors
from optkit.errors import OptkitError, RecipeError, shown


def test_the_parts_of_a_line():
    assert str(RecipeError("wrong")) == "wrong"
    full = RecipeError("must be 2, 3, 4 or 8", where="r.yaml:3:5", found=5, remedy="choose 4")
    assert str(full) == "r.yaml:3:5: must be 2, 3, 4 or 8, found 5; choose 4"


def test_no_message_ever_has_two_lines():
    assert str(OptkitError("a\nb", where="c\td", found="e\nf", remedy="g\r\nh")) == "c d: a b, found 'e\\nf'; g h"


@pytest.mark.parametrize(
    ("value", "text"), [(True, "true"), (False, "false"), (1, "1"), ("a", "'a'"), (None, "null"), ([1], "[1]")]
)
def test_values_are_shown_as_yaml_spells_them(value, text):
    assert shown(value) == text


def test_long_values_are_cut():
    assert shown("x" * 1000) == "'" + "x" * 58 + "…"


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = {
        line.split()[-0 if line.startswith("    O") else 1]: int(next(word for word in line.split() if word.isdigit()))
        for line in (errors.__doc__ or "").splitlines()
        if "├" in line or "└" in line
    }
    kinds = {name: getattr(errors, name) for name in errors.__all__}
    assert drawn == {name: kind.exit_code for name, kind in kinds.items() if kind is not OptkitError}
    assert all(issubclass(kind, OptkitError) for kind in kinds.values())
