"""Files and texts -> documents."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from optkit.binding.composing import Composer
from optkit.binding.document import Document
from optkit.errors import RecipeError

__all__ = ["parse", "read"]

_MAX_BYTES = 1 << 20
_SAVE_AS_UTF8 = "save it as UTF-8 without BOM"
# All that is not c-printable in YAML 1.2.2, section 5.1.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# Part of what ruamel says of a syntax error, what the user should know, and what to do. The first that fits counts.
_SYNTAX = (
    (r"'\t' that cannot start", "a tab cannot stand here", "use spaces"),
    ("that cannot start any token", "a plain text cannot start with this character", "put it in quotes"),
    ("mapping values are not", "': ' cannot stand here", "check the indentation, or put the text in quotes"),
    ("sequence entries are not", "a list item cannot stand here", "put the list on lines of its own"),
    ("expected ':'", "expected ':' after a key", "write key: value"),
    ("unexpected end of stream", "a quote is never closed", "close it"),
    ("'<stream end>'", "a bracket is never closed", "close it"),
    ("expected ',' or", "a comma or the closing bracket is missing before this", "add it"),
    ("expected <block end>", "this does not fit what stands before it", "check the indentation and the quotes"),
    ("'<document start>'", "this does not fit what stands before it", "check the indentation and the quotes"),
    ("unknown escape", "unknown escape in a double-quoted text", "use single quotes, or double the backslash"),
    ("expected escape", "unknown escape in a double-quoted text", "use single quotes, or double the backslash"),
)


def read(path: Path) -> Document:
    """The document in a file.

    Raises:
        RecipeError: the file cannot be read, is larger than 1 MiB, is not UTF-8, or see `parse`.
    """
    where = str(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        others = [other.name for other in path.parent.glob("*.y*ml") if other.name != path.name]
        near = difflib.get_close_matches(path.name, others, n=1)
        remedy = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        raise RecipeError("no such file", where=where, remedy=remedy) from error
    except IsADirectoryError as error:
        raise RecipeError("is a directory", where=where, remedy="name the file inside it") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "check the path and its permissions"
        raise RecipeError(f"cannot be read ({reason})", where=where, remedy=remedy) from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError("is UTF-16 or UTF-32", where=where, remedy=_SAVE_AS_UTF8)
    if len(content) > _MAX_BYTES:
        _too_large(where)
    try:
        return parse(content.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        line, column = _place(content[: error.start].decode("utf-8"))
        what = f"is not UTF-8, byte 0x{content[error.start]:02x}"
        raise RecipeError(what, where=f"{where}:{line}:{column}", remedy=_SAVE_AS_UTF8) from error


def parse(text: str, path: str = "<recipe>") -> Document:
    """The document in a text.

    Args:
        text: one YAML 1.2 document whose root is a mapping.
        path: the file's name, for messages.

    Raises:
        RecipeError: the text is not YAML, or holds what recipes may not: anchors, aliases, tags, merge keys, duplicate
            or non-string keys, numbers that are not finite, more than one document, more than 32 levels.
    """
    if len(text) > _MAX_BYTES:
        _too_large(path)
    if text.startswith("\ufeff"):
        raise RecipeError("starts with a byte order mark", where=f"{path}:1:1", remedy=_SAVE_AS_UTF8)
    if forbidden := _FORBIDDEN.search(text):
        line, column = _place(text[: forbidden.start()])
        remedy = _SAVE_AS_UTF8 if forbidden[0] == "\0" else "remove it"
        what = f"holds the control character U+{ord(forbidden[0]):04X}"
        raise RecipeError(what, where=f"{path}:{line}:{column}", remedy=remedy)
    composer = Composer(path)
    for event in _events(text, path):
        composer.take(event)
    if composer.root is None:
        raise RecipeError("is empty", where=path, remedy="write key: value lines")
    return Document(path, composer.root, text, composer.places)


def _too_large(where: str) -> NoReturn:
    raise RecipeError("is larger than 1 MiB", where=where, remedy="a recipe is a few lines, check the path")


def _place(before: str) -> tuple[int, int]:
    lines = re.split(r"\r\n|\r|\n", before)
    return len(lines), len(lines[-1]) + 1


def _events(text: str, path: str) -> Iterator[Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError

    events = YAML(typ="safe", pure=True).parse(text)
    where = path
    while True:
        try:
            event = next(events, None)
        except MarkedYAMLError as error:
            raise _syntax_error(error, path) from error
        # ruamel lets slip through whatever a damaged escape or directive makes its scanner run into.
        except Exception as error:
            raise RecipeError(f"not valid YAML: {error}", where=where) from error
        if event is None:
            return
        where = f"{path}:{event.end_mark.line + 1}:{event.end_mark.column + 1}"
        yield event


def _syntax_error(error: Any, path: str) -> RecipeError:
    said = " ".join(str(error.problem or error.context or "syntax error").split())
    what, remedy = next(((what, remedy) for part, what, remedy in _SYNTAX if part in said), (said, ""))
    # Of something never closed, the place where it opens helps; the end of the file does not.
    mark = error.context_mark if "never closed" in what else error.problem_mark
    mark = mark or error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
    return RecipeError(f"not valid YAML: {what}", where=where, remedy=remedy)
