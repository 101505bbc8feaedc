"""Plain data -> pydantic models, and pydantic's errors -> ours."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from optkit.binding.composing import resolved
from optkit.binding.document import Document, Keys, kind_of, spelt
from optkit.errors import RecipeError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import ErrorDetails

__all__ = ["bind"]

T = TypeVar("T", bound="BaseModel")

_NUMBERS = dict.fromkeys(("int_type", "int_from_float"), "an integer") | {"float_type": "a number"}
_LISTS = dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "a list")
_MAPPINGS = dict.fromkeys(("model_type", "dict_type", "dataclass_type"), "a mapping")
_SCALARS = {"string_type": "a string", "bool_type": "a boolean", "none_required": "null"}
_TYPES = _SCALARS | _NUMBERS | _LISTS | _MAPPINGS
_RAISED = {"value_error", "assertion_error"}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_COUNTED = {"too_short": "item", "too_long": "item", "string_too_short": "character", "string_too_long": "character"}


def bind(model: type[T], data: Any, document: Document, *keys: str | int) -> T:
    """Validate `data`, which stands at `keys` in `document`, strictly: lists become tuples, but `"4"` is no integer.

    A `ValueError` that a validator of the model raises becomes the message; what follows `"; "` in it is the remedy.

    Raises:
        RecipeError: of the first mistake by position.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise _explained(error.errors(include_url=False), model, data, document, keys) from error
    except RecipeError as error:
        raise document.error(error.what, *keys, found=error.found, remedy=error.remedy) from error


@dataclass(frozen=True)
class _Mistake:
    """An error of pydantic, located in the data."""

    error: ErrorDetails
    path: Keys
    rank: tuple[float, ...]
    """Orders mistakes by position; what is missing comes last in its parent."""
    value: Any
    """What stands at `path`."""

    @property
    def of_a_choice(self) -> bool:
        """Whether the error's location names a choice of a union besides the path."""
        return len(self.path) < len(self.error["loc"])


def _explained(
    errors: list[ErrorDetails], model: type[BaseModel], data: Any, document: Document, keys: Keys
) -> RecipeError:
    """The first mistake. Several at one path are the choices of a union, and are named together."""
    order = {path: number for number, path in enumerate(_paths(data, ()))}
    mistakes = [_located(error, data, order) for error in errors]
    # A choice that fits further into the data says more than one that does not fit at all.
    reached = {mistake.path[:length] for mistake in mistakes for length in range(len(mistake.path))}
    mistakes = [mistake for mistake in mistakes if not (mistake.of_a_choice and mistake.path in reached)] or mistakes
    first = min(mistakes, key=lambda mistake: mistake.rank)
    kind, path, value = first.error["type"], first.path, first.value
    if kind == "missing":
        key = spelt(str(first.error["loc"][-1]))
        return document.error(f"{key} is missing", *keys, *path, remedy=f"add {key}: VALUE")
    if kind == "extra_forbidden":
        remedy = _known_keys(str(path[-1]), _schemas(model, path[:-1]))
        return document.error("unknown key", *keys, *path, remedy=remedy)
    same = [mistake.error for mistake in mistakes if mistake.rank == first.rank]
    what, remedy = _phrases(same, _schemas(model, path)), _remedy(same, value)
    if kind in _RAISED:
        what, _, raised = what.partition("; ")
        remedy = raised or remedy
    elif isinstance(value, dict | list | None):
        what += f", found {kind_of(value)}"
    found = None if isinstance(value, dict | list) else value
    return document.error(what, *keys, *path, found=found, remedy=remedy)


def _paths(data: Any, path: Keys) -> Iterator[Keys]:
    """Every path in the data, in the order of the text."""
    yield path
    for key, child in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from _paths(child, (*path, key))


def _located(error: ErrorDetails, data: Any, order: Mapping[Keys, int]) -> _Mistake:
    path: Keys = ()
    for key in error["loc"]:
        if (*path, key) in order:  # else the name of a union's choice, or of a missing key
            path, data = (*path, key), data[key]
    rank = tuple(order[path[:length]] for length in range(1, len(path) + 1))
    return _Mistake(error, path, (*rank, math.inf) if error["type"] == "missing" else rank, data)


def _phrases(errors: list[ErrorDetails], schemas: list[dict[str, Any]]) -> str:
    first, *others = dict.fromkeys(_phrase(error, schemas) for error in errors)
    return " or ".join([first, *(other.removeprefix("must be ") for other in others)])


def _phrase(error: ErrorDetails, schemas: list[dict[str, Any]]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}"
    if kind in _RAISED:
        return str(context["error"])
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    if context.keys() & _BOUNDS.keys():
        own = {_BOUNDS[name]: bound for name, bound in context.items() if name in _BOUNDS}
        return f"must be {_range(next((s for s in schemas if own.items() <= s.items()), own))}"
    if kind in _COUNTED:
        word, bound = ("least", context["min_length"]) if "short" in kind else ("most", context["max_length"])
        return f"must have at {word} {bound} {_COUNTED[kind]}{'' if bound == 1 else 's'}"
    said = error["msg"].replace("Input should", "must")
    return said[:1].lower() + said[1:]


def _range(schema: Mapping[str, Any]) -> str:
    if {"minimum", "maximum"} <= schema.keys():
        return f"{schema['minimum']} to {schema['maximum']}"
    words = zip(_BOUNDS.values(), ("at least", "more than", "at most", "less than"), strict=True)
    return " and ".join(f"{word} {schema[name]}" for name, word in words if name in schema)


def _remedy(errors: list[ErrorDetails], value: Any) -> str:
    kinds = {error["type"] for error in errors}
    number = value.replace("_", "") if isinstance(value, str) else "none"
    if value is None:
        return "give it a value, or leave the key out"
    if "bool_type" in kinds:
        return "write true or false"
    if "string_type" in kinds and isinstance(value, int | float):
        return "put it in quotes"
    if kinds & _NUMBERS.keys() and isinstance(resolved(number), int | float):
        return f"write {number} without quotes"
    if kinds & _NUMBERS.keys() and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kinds & _LISTS.keys():
        return "start each item with '- '" if isinstance(value, dict) else f"write [{json.dumps(value)}]"
    if kinds & _MAPPINGS.keys():
        return "write key: value lines"
    expected = " ".join(error.get("ctx", {}).get("expected", "") for error in errors)
    choices = re.findall("'([^']*)'", expected)
    if str(value) in choices or str(value) in re.findall(r"\d+", expected):
        return "put it in quotes" if str(value) in choices else f"write {value} without quotes"
    near = difflib.get_close_matches(str(value), choices, n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _known_keys(key: str, schemas: list[dict[str, Any]]) -> str:
    known = list(dict.fromkeys(name for schema in schemas for name in schema.get("properties", {})))
    near = difflib.get_close_matches(key, known, n=1)
    names = f"known keys: {', '.join(known)}" if known else "remove it, there are no keys here"
    return f"did you mean {near[0]!r}? ({names})" if near else names


def _schemas(model: type[BaseModel], path: Keys) -> list[dict[str, Any]]:
    """What the model's JSON Schema says of the values at `path`, one entry a choice; nothing if it has no schema."""
    from pydantic.errors import PydanticUserError

    try:
        root = model.model_json_schema()
    except PydanticUserError:
        return []

    def choices(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if "$ref" in schema:
                yield from choices(root["$defs"][schema["$ref"].removeprefix("#/$defs/")])
            for choice in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
                yield from choices(choice)
            yield schema

    found = list(choices(root))
    for key in path:
        below = [
            schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(key, str)
            else dict(enumerate(schema.get("prefixItems", ()))).get(key, schema.get("items"))
            for schema in found
        ]
        found = [choice for schema in below for choice in choices(schema)]
    return found
