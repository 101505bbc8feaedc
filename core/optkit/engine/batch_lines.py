"""The two files of a batch: requests, one a line, and their answers, whose ids say what they are answers to.

https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import difflib
import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optkit.engine.openai import BODIES
from optkit.errors import RecipeError, RequestError

__all__ = ["Counts", "Input", "Line", "answers_all", "check", "recorded"]

_KEYS = ("custom_id", "method", "url", "body")
_ABSENT = -1


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch."""

    place: int
    """From 0; blank lines do not count."""
    id: str
    """Of its answer: a hash of the line and of the artifact that answers."""
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(slots=True)
class Input:
    """A file of requests that was checked whole. About 250 bytes of memory for each line."""

    file: Path
    artifact: str
    """Digest of the artifact that answers."""
    places: dict[bytes, int] = field(default_factory=dict)
    """Where each answer belongs, by the hash in its id."""

    def __len__(self) -> int:
        return len(self.places)

    def lines(self) -> Iterator[Line]:
        """All of them, in order."""
        with self.file.open("rb") as stream:
            for place, raw in enumerate(raw for raw in stream if raw.strip()):
                known = json.loads(raw)
                yield Line(place, _id(self.artifact, raw), known["custom_id"], known["url"], known["body"])

    def place(self, answer: Any) -> int | None:
        """Where an answer belongs, or None if it is none of ours."""
        if not isinstance(answer, dict):
            return None
        try:
            return self.places.get(bytes.fromhex(str(answer.get("id")).removeprefix(_PREFIX)))
        except ValueError:
            return None


_PREFIX = "batch_req_"


@dataclass(slots=True)
class Counts:
    """What answers come to."""

    succeeded: int = 0
    failed: int = 0
    """Answers with another status than 200."""
    prompt_tokens: int = 0
    output_tokens: int = 0

    def add(self, answer: dict[str, Any]) -> None:
        """Count one answer."""
        response = answer["response"]
        if response["status_code"] != 200:
            self.failed += 1
            return
        self.succeeded += 1
        usage = response["body"]["usage"]
        # Responses have names of their own.
        self.prompt_tokens += usage.get("prompt_tokens", usage.get("input_tokens"))
        self.output_tokens += usage.get("completion_tokens", usage.get("output_tokens"))


def check(file: Path, artifact: str) -> Input:
    """Read a file of requests from its first line to its last, so that no work begins that a wrong line would stop.

    Args:
        file: in OpenAI's batch format.
        artifact: digest of the artifact that will answer.

    Raises:
        RequestError: a line is no request, or has the `custom_id` of another one; the message says which.
        RecipeError: the file cannot be read.
    """
    found, seen = Input(file, artifact), dict[bytes, int]()
    try:
        with file.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if raw.strip():
                    custom_id = _checked(raw, f"{file}:{number}")
                    first = seen.setdefault(_digest(custom_id.encode("utf-8", "surrogatepass")), number)
                    if first != number:
                        raise RequestError(
                            f"has the custom_id of line {first}",
                            where=f"{file}:{number}",
                            found=custom_id,
                            remedy="give each its own",
                        )
                    found.places[_digest(artifact.encode() + raw.strip())] = len(found)
    except OSError as error:
        raise RecipeError(f"cannot be read ({error.strerror})", where=str(file), remedy="check the path") from error
    if not found.places:
        raise RequestError("holds no request", where=str(file), remedy="write one a line, in OpenAI's batch format")
    return found


def recorded(file: Path, known: Input) -> tuple[array[int], Counts]:
    """What an unfinished run has answered. A last line that was cut off is removed from the file.

    Returns:
        For each line of the input the byte at which its answer begins, -1 without one; and the counts.

    Raises:
        RecipeError: an answer belongs to another input or comes from another artifact.
    """
    offsets, counts = array("q", [_ABSENT]) * len(known), Counts()
    with file.open("r+b") as stream:
        end = 0
        for raw in stream:
            if not raw.endswith(b"\n"):
                stream.truncate(end)
                break
            answer = _answer(raw)
            place = known.place(answer)
            if place is None:
                raise RecipeError(
                    f"holds answers to other requests than {known.file}, or of another artifact",
                    where=str(file),
                    remedy="choose another output, or add --overwrite",
                )
            if offsets[place] == _ABSENT:
                counts.add(answer)
                offsets[place] = end
            end += len(raw)
    return offsets, counts


def answers_all(file: Path, known: Input) -> Counts | None:
    """What a finished run came to, or None where the file is not the answer to this input by this artifact."""
    counts, expected = Counts(), iter(range(len(known)))
    with file.open("rb") as stream:
        for raw in stream:
            answer = _answer(raw)
            if known.place(answer) != next(expected, None) or answer is None:
                return None
            counts.add(answer)
    return counts if next(expected, None) is None else None


def _answer(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _id(artifact: str, raw: bytes) -> str:
    return _PREFIX + _digest(artifact.encode() + raw.strip()).hex()


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=12).digest()


def _checked(raw: bytes, where: str) -> str:
    """The `custom_id` of a line that is a request."""
    try:
        line = json.loads(raw.rstrip().decode("utf-8"), parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise RequestError(f"is no JSON ({error.msg.lower()})", where=f"{where}:{error.colno}") from error
    except UnicodeDecodeError as error:
        raise RequestError("is not UTF-8", where=f"{where}:{error.start + 1}", remedy="save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"is no JSON ({reason})", where=where) from error
    if not isinstance(line, dict):
        raise RequestError("is no JSON object", where=where, found=line, remedy=f"give {', '.join(_KEYS)}")
    for key in _KEYS:
        if key not in line:
            raise RequestError(f"{key} is missing", where=where)
    for key in line:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            raise RequestError("unknown key", where=where, found=key, remedy=f"did you mean {near[0]}?" if near else "")
    if not (isinstance(line["custom_id"], str) and line["custom_id"]):
        raise RequestError("custom_id is no text", where=where, found=line["custom_id"])
    if line["method"] != "POST":
        raise RequestError("method is not POST", where=where, found=line["method"])
    if not isinstance(line["url"], str) or line["url"] not in BODIES:
        raise RequestError("unknown url", where=where, found=line["url"], remedy=f"there are {' and '.join(BODIES)}")
    if not isinstance(line["body"], dict):
        raise RequestError("body is no JSON object", where=where, found=line["body"])
    return line["custom_id"]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number there")
