"""YAML events -> plain data, one event at a time, so that nothing is ever expanded and no nesting exhausts the stack.

Scalars follow the core schema of YAML 1.2.2, section 10.3.2.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from optkit.binding.document import MAX_DEPTH, MAX_DIGITS, Keys, dotted, kind_of, unfit
from optkit.errors import RecipeError

__all__ = ["Composer", "resolved"]

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass
class _Open:
    """A mapping or list whose end has not come."""

    node: dict[str, Any] | list[Any]
    keys: Keys
    key: str | None = None
    """The mapping's key that waits for its value."""


class Composer:
    """Makes plain data of events, one at a time, and remembers where everything stands.

    Attributes:
        root: the data, None as long as there is none.
        places: line and column of every key and item, from 1.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.root: dict[str, Any] | None = None
        self.places: dict[Keys, tuple[int, int]] = {}
        self._documents = 0
        self._open: list[_Open] = []

    def take(self, event: Any) -> None:
        """The next event.

        Raises:
            RecipeError: it is one that a recipe may not have.
        """
        match type(event).__name__:
            case "DocumentStartEvent":
                self._start(event)
            case "AliasEvent":
                self._refuse("aliases are not allowed", event, found=f"*{event.anchor}", remedy="write the value out")
            case "ScalarEvent" | "MappingStartEvent" | "SequenceStartEvent" as name:
                self._node(event, name)
            case "MappingEndEvent" | "SequenceEndEvent":
                self._open.pop()

    def _start(self, event: Any) -> None:
        self._documents += 1
        if self._documents > 1:
            self._refuse("a second document starts here", event, remedy="keep one document a file")
        if event.version not in (None, (1, 2)):
            version = ".".join(map(str, event.version))
            self._refuse("only YAML 1.2 is read", event, found=version, remedy="remove the %YAML line")

    def _node(self, event: Any, name: str) -> None:
        if event.anchor is not None:
            self._refuse("anchors are not allowed", event, found=f"&{event.anchor}", remedy="remove it")
        if event.tag is not None:
            self._refuse(
                "tags are not allowed",
                event,
                found=str(event.tag).replace("tag:yaml.org,2002:", "!!"),
                remedy="remove it",
            )
        scalar = name == "ScalarEvent"
        value: Any = self._scalar(event) if scalar else {} if name == "MappingStartEvent" else []
        if not self._open:
            self._begin(event, value)
            return
        parent = self._open[-1]
        if isinstance(parent.node, list):
            keys = (*parent.keys, len(parent.node))
            self.places[keys] = _start_of(event)
            parent.node.append(value)
        elif parent.key is None:
            self._key(event, parent, value)
            return
        else:
            keys = (*parent.keys, parent.key)
            parent.node[parent.key] = value
            parent.key = None
        if not scalar:
            if len(self._open) >= MAX_DEPTH:
                self._refuse(f"nested deeper than {MAX_DEPTH} levels", event)
            self._open.append(_Open(value, keys))

    def _begin(self, event: Any, value: Any) -> None:
        if value is None and event.value == "":
            return
        if not isinstance(value, dict):
            self._refuse(f"must be a mapping, found {kind_of(value)}", event, remedy="write key: value lines")
        self.root = value
        self.places[()] = _start_of(event)
        self._open.append(_Open(value, ()))

    def _key(self, event: Any, parent: _Open, key: Any) -> None:
        if key == "<<" and event.implicit[0]:
            self._refuse("merge keys are not allowed", event, remedy="write the keys out")
        if not isinstance(key, str):
            self._refuse(f"a key must be a string, found {kind_of(key)}", event, remedy="put it in quotes")
        keys = (*parent.keys, key)
        if keys in self.places:
            first = self.places[keys][0]
            what = f"{dotted(keys)}: this key is there twice, first on line {first}"
            self._refuse(what, event, remedy="remove one of them")
        self.places[keys] = _start_of(event)
        parent.key = key

    def _scalar(self, event: Any) -> Any:
        if event.implicit[0]:
            value = resolved(event.value)
        else:
            try:  # JSON writes characters beyond U+FFFF as two escapes.
                value = event.value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                value = event.value
        if fault := unfit(value):
            self._refuse(fault, event, found=event.value)
        return value

    def _refuse(self, what: str, event: Any, *, found: object = None, remedy: str = "") -> NoReturn:
        line, column = _start_of(event)
        raise RecipeError(what, where=f"{self.path}:{line}:{column}", found=found, remedy=remedy)


def _start_of(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


def resolved(text: str) -> bool | int | float | str | None:
    """The value of a plain scalar. Of an integer too long for the interpreter only that it is too long."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        return 10**MAX_DIGITS if len(text) > 2 * MAX_DIGITS else int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    return math.inf if _NOT_FINITE.fullmatch(text) else text
