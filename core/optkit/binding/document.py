"""Plain data that knows where in a file each part of it stands."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from optkit.errors import RecipeError, shown

__all__ = ["MAX_DEPTH", "MAX_DIGITS", "Document", "Keys", "dotted", "from_data", "kind_of", "spelt", "unfit"]

Keys: TypeAlias = tuple[str | int, ...]

MAX_DEPTH = 32
"""Mappings and lists in each other."""
MAX_DIGITS = 100
"""Of an integer."""

_PLAIN_KEY = re.compile(r"[\w.-]{1,60}")


@dataclass(frozen=True)
class Document:
    """Plain data, and where in a file each part of it stands."""

    path: str
    """As the user wrote it, for messages."""
    data: dict[str, Any]
    """Nothing but dict, list, str, int, finite float, bool and None."""
    text: str
    """What `data` was parsed from; empty when it came from Python."""
    places: Mapping[Keys, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)
    """Line and column, from 1, of every mapping's keys and every list's items, by their path in `data`."""

    def where(self, *keys: str | int) -> str:
        """`file:line:column` of the key or item at this path, or of its nearest ancestor that exists."""
        for length in range(len(keys), -1, -1):
            if keys[:length] in self.places:
                line, column = self.places[keys[:length]]
                return f"{self.path}:{line}:{column}"
        return self.path

    def error(self, what: str, *keys: str | int, found: object = None, remedy: str = "") -> RecipeError:
        """An error at this path: position, dotted path, what is wrong, what was found, what to do."""
        what = f"{dotted(keys)}: {what}" if keys else what
        return RecipeError(what, where=self.where(*keys), found=found, remedy=remedy)


def from_data(data: Mapping[str, Any], path: str = "<recipe>") -> Document:
    """A document from Python data; `where` gives only its `path`.

    Raises:
        RecipeError: it holds something that YAML data cannot, or more than 32 levels.
    """
    document = Document(path, {}, "")
    document.data.update(_plain(document, data, ()))
    return document


def dotted(keys: Keys) -> str:
    """A path as messages show it: `transforms[0].quantize.rtn.bits`."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{spelt(key)}" for key in keys)
    return "".join(parts).removeprefix(".")


def spelt(key: str) -> str:
    """A key as messages show it: quoted and shortened if it is no plain word."""
    return key if _PLAIN_KEY.fullmatch(key) else shown(key)


def kind_of(value: object) -> str:
    """A value as messages show it: of a mapping or list only that it is one."""
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else shown(value)


def unfit(value: object) -> str:
    """Why a scalar cannot be in a document, or nothing."""
    match value:
        case None | bool():
            return ""
        case int():
            return "" if abs(value) < 10**MAX_DIGITS else f"a number has more than {MAX_DIGITS} digits"
        case float():
            return "" if math.isfinite(value) else "must be a finite number"
        case str():
            fits = "\0" not in value and not re.search("[\ud800-\udfff]", value)
            return "" if fits else "a text holds a NUL or half a surrogate pair"
    return f"must be plain data, not {type(value).__name__}"


def _plain(document: Document, value: Any, keys: Keys) -> Any:
    if isinstance(value, Mapping | list | tuple) and len(keys) >= MAX_DEPTH:
        raise document.error(f"nested deeper than {MAX_DEPTH} levels", *keys[:1])
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or unfit(key):
                raise document.error("a key must be a string", *keys, found=key)
        return {key: _plain(document, child, (*keys, key)) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(document, child, (*keys, index)) for index, child in enumerate(value)]
    if fault := unfit(value):
        raise document.error(fault, *keys)
    return value
