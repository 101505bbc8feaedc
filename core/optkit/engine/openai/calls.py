"""Calls of tools in a model's output, as text comes.

A call begins to count when its function is known to be one of the tools and its arguments begin; from then on the
arguments are given out as the model writes them, so that clients must be ready for broken JSON, as with OpenAI's own
models. What only looks like a call is text. Text and calls do not depend on how the output was cut into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from optkit.engine.text import overlap

__all__ = ["CallFormat", "CallParser", "Piece"]

_HEAD = 512
"""Characters within which a call that begins with its name says it."""
_MARKED = re.compile(r'[{}\[\]"]')
_QUOTED = re.compile(r'["\\]')

_State: TypeAlias = Literal["text", "free", "prelude", "opening", "object", "arguments", "rest", "after"]


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family of models writes calls: JSON objects with `name` and arguments, and what stands around them."""

    begin: str
    """Before the calls. Empty: calls stand at the beginning of the output, or nowhere."""
    opening: str
    """Before the first object; it may be missing."""
    separator: str
    """Between two objects; empty where each has its own `begin`."""
    end: str
    """After the last object; it may be missing."""
    arguments: str
    """The key of the arguments."""
    prelude: str = ""
    """Before calls at the beginning of the output; it may be missing."""


class Piece(NamedTuple):
    """Text, where `call` is None; or a bit of a call: its name first, then its arguments as they come."""

    text: str
    call: int | None = None
    """From 0."""
    name: str = ""
    """Not empty in the first piece of a call."""


class CallParser:
    """Tells calls from text in one output.

    Args:
        form: how the model writes them.
        names: of the tools.
        most: calls that are given out; what else the model calls is dropped.
    """

    def __init__(self, form: CallFormat, names: Collection[str], most: int | None = None) -> None:
        self._form, self._names, self._most = form, names, most
        self._head = re.compile(rf'\{{\s*"name"\s*:\s*"([a-zA-Z0-9_-]+)"\s*,\s*"{form.arguments}"\s*:\s*(?=\{{)')
        self._plain: _State = "text" if form.begin else "free"
        self._state: _State = "text" if form.begin else "prelude"
        self._buffer = ""
        self._before = ""  # what stands before an object that may be a call
        self._parts: list[str] = []  # of that object
        self._size = 0
        self._space = ""  # is text, unless a call comes next
        self._object = _Object()
        self._muted = False
        self._pieces: list[Piece] = []
        self.calls = 0
        """How many were given out."""

    def push(self, text: str) -> list[Piece]:
        """What this text adds."""
        self._buffer += text
        while self._buffer and self._look(last=False):
            pass
        return self._taken()

    def end(self) -> list[Piece]:
        """What was held back, at the end of the output."""
        while self._buffer and self._look(last=True):
            pass
        if self._state in ("prelude", "opening", "object"):
            self._write(self._before + "".join(self._parts))
        if self._space and not self.calls:
            self._pieces.append(Piece(self._space))
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _look(self, *, last: bool) -> bool:
        """Take what can be taken of the buffer; whether another look is worth while before more text comes."""
        match self._state:
            case "text":
                return self._find_begin(last=last)
            case "free":
                self._write(self._buffer)
                self._buffer = ""
                return False
            case "prelude":
                return self._pass(self._form.prelude, "opening", last=last)
            case "opening":
                return self._pass(self._form.opening, "object", last=last)
            case "object":
                return self._read_object()
            case "arguments" | "rest":
                return self._read_on()
            case "after":
                return self._go_on(last=last)

    def _find_begin(self, *, last: bool) -> bool:
        begin, place = self._form.begin, self._buffer.find(self._form.begin)
        if place >= 0:
            self._write(self._buffer[:place])
            self._buffer, self._before, self._state = self._buffer[place + len(begin) :], begin, "opening"
            return True
        ready = len(self._buffer) - (0 if last else overlap(self._buffer, begin))
        self._write(self._buffer[:ready])
        self._buffer = self._buffer[ready:]
        return False

    def _pass(self, word: str, then: _State, *, last: bool) -> bool:
        """Go past a word that may be missing."""
        self._skip_space()
        if not self._buffer or (not last and _may_become(self._buffer, word)):
            return False
        if self._buffer.startswith(word):
            self._move(len(word))
        self._state = then
        return True

    def _read_object(self) -> bool:
        if not self._parts:
            self._skip_space()
            if self._buffer and self._buffer[0] != "{":
                self._fail()
                return True
        closed = self._object.feed(self._buffer)
        size = len(self._buffer) if closed is None else closed
        self._parts.append(self._buffer[:size])
        self._buffer = self._buffer[size:]
        if self._size < _HEAD:
            begun = "".join(self._parts)
            found = self._head.match(begun[:_HEAD])
            if found is not None and found[1] in self._names:
                self._start(found[1], then="arguments")
                self._buffer = begun[found.end() :] + self._buffer
                return True
        self._size += size
        if closed is not None:
            self._judge("".join(self._parts))
        return closed is not None

    def _judge(self, text: str) -> None:
        """A whole object that did not begin like a call may be one, in another order."""
        try:
            known = json.loads(text)
            name, arguments = known.get("name"), known.get(self._form.arguments, {})
            if isinstance(arguments, str):  # some models write the text that clients get
                arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            name = arguments = None
        if isinstance(name, str) and name in self._names and isinstance(arguments, dict):
            self._start(name, then="after")
            self._argue(json.dumps(arguments, ensure_ascii=False))
        else:
            self._fail()

    def _read_on(self) -> bool:
        closed = self._object.feed(self._buffer)
        size = len(self._buffer) if closed is None else closed
        if self._state == "arguments":
            self._argue(self._buffer[:size])
        self._buffer = self._buffer[size:]
        if closed is None:
            return False
        self._state, self._object = ("rest", _Object(1)) if self._state == "arguments" else ("after", _Object())
        return True

    def _go_on(self, *, last: bool) -> bool:
        """After a call: another one, the end of them, or text."""
        self._skip_space()
        separator, end = self._form.separator, self._form.end
        if not self._buffer:
            return False
        if separator and self._buffer.startswith(separator):
            self._move(len(separator))
            self._state = "object"
        elif end and self._buffer.startswith(end):
            self._buffer, self._before, self._state = self._buffer[len(end) :], "", self._plain
        elif not last and (_may_become(self._buffer, separator) or _may_become(self._buffer, end)):
            return False
        else:
            self._buffer, self._before, self._state = self._before + self._buffer, "", self._plain
        return True

    def _start(self, name: str, then: _State) -> None:
        self._forget()
        self._space, self._state = "", then
        self._muted = self._most is not None and self.calls >= self._most
        if not self._muted:
            self.calls += 1
            self._pieces.append(Piece("", self.calls - 1, name))

    def _argue(self, text: str) -> None:
        if not self._muted and text:
            self._pieces.append(Piece(text, self.calls - 1))

    def _fail(self) -> None:
        """It was no call."""
        text = self._before + "".join(self._parts)
        self._forget()
        self._state = self._plain
        self._write(text)

    def _forget(self) -> None:
        self._before, self._parts, self._size, self._object = "", [], 0, _Object()

    def _write(self, text: str) -> None:
        text = self._space + text
        whole = text.rstrip()
        self._space = text[len(whole) :]
        if whole:
            self._pieces.append(Piece(whole))

    def _skip_space(self) -> None:
        self._move(len(self._buffer) - len(self._buffer.lstrip()))

    def _move(self, size: int) -> None:
        self._before += self._buffer[:size]
        self._buffer = self._buffer[size:]


class _Object:
    """Finds the end of a JSON value that comes in pieces. Whether it is valid is for others to say."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._quoted, self._escaped = depth, False, False

    def feed(self, text: str) -> int | None:
        """Where in `text` the value ends, or None if it goes on."""
        place = 0
        while place < len(text):
            if self._escaped:
                self._escaped, place = False, place + 1
                continue
            found = (_QUOTED if self._quoted else _MARKED).search(text, place)
            if found is None:
                return None
            place, mark = found.end(), found[0]
            if mark == '"':
                self._quoted = not self._quoted
            elif mark == "\\":
                self._escaped = True
            else:
                self._depth += 1 if mark in "{[" else -1
                if not self._depth:
                    return place
        return None


def _may_become(text: str, word: str) -> bool:
    return len(text) < len(word) and word.startswith(text)
