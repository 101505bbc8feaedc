"""Checks an uploaded file of requests before any work begins, in pieces, without holding it in memory.

https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from optkit.serve.batches.quota import Quota

__all__ = ["Checked", "Fault", "parse"]

_KEYS = ("custom_id", "method", "url", "body")
_PIECE = 1 << 20
"""Bytes that are checked at a time."""
_FAULTS = 20
"""Faults after which no more are looked for."""
_ID, _MODEL = 512, 256
"""Characters at most."""


class Fault(Exception):
    """What is wrong with a line.

    Args:
        code: for programs.
        message: for people; has nothing of the line in it.
        param: the key of the line that is wrong.
    """

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


@dataclass(slots=True)
class Checked:
    """What a check finds. 16 bytes of memory for each line, and 12 more as keys of a set."""

    endpoint: str
    quota: Quota
    starts: array[int] = field(default_factory=lambda: array("q"))
    """Where each line that holds a request begins."""
    lengths: array[int] = field(default_factory=lambda: array("q"))
    """In bytes."""
    model: str | None = None
    """The one that all lines name, or None where all name none."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """As OpenAI's `batch.errors.data`."""
    _seen: set[bytes] = field(default_factory=set)

    def pieces(self, stream: BinaryIO) -> Iterator[None]:
        """Check a file; control comes back after every piece of it, so that others get their turn and it can end."""
        number = start = paused = 0
        while raw := stream.readline(self.quota.line_bytes + 1):
            number += 1
            if len(raw) > self.quota.line_bytes:
                self._note(number, Fault("line_too_long", f"is longer than {self.quota.line_bytes} bytes"))
                return
            if raw.strip():
                if len(self.starts) == self.quota.lines:
                    self._note(number, Fault("too_many_tasks", f"a batch has {self.quota.lines} requests at most"))
                    return
                try:
                    self._take(parse(raw))
                except Fault as fault:
                    self._note(number, fault)
                    if len(self.faults) == _FAULTS:
                        return
                self.starts.append(start)
                self.lengths.append(len(raw))
            start += len(raw)
            if start - paused > _PIECE:
                paused = start
                yield
        if not self.starts:
            self._note(None, Fault("empty_file", "the file holds no request"))

    def _take(self, line: dict[str, Any]) -> None:
        for key in _KEYS:
            if key not in line:
                raise Fault("missing_required_parameter", f"{key} is missing", key)
        if len(line) > len(_KEYS):
            raise Fault("unknown_parameter", f"has other keys than {', '.join(_KEYS)}")
        custom_id = line["custom_id"]
        if not (isinstance(custom_id, str) and 0 < len(custom_id) <= _ID):
            raise Fault("invalid_custom_id", f"custom_id is no text of 1 to {_ID} characters", "custom_id")
        if line["method"] != "POST":
            raise Fault("invalid_method", "method is not POST", "method")
        if line["url"] != self.endpoint:
            raise Fault("mismatched_endpoint", f"url is not the batch's endpoint {self.endpoint}", "url")
        if not isinstance(line["body"], dict):
            raise Fault("invalid_body", "body is no JSON object", "body")
        model = line["body"].get("model")
        # Also what UTF-8 cannot write, which JSON can: a lone half of a surrogate pair.
        if model is not None and not (isinstance(model, str) and len(model) <= _MODEL and model.isprintable()):
            raise Fault("invalid_model", f"model is no text of {_MODEL} characters at most", "body.model")
        if self._seen and model != self.model:
            raise Fault("mismatched_model", "model is not that of the lines before; a batch has one", "body.model")
        self.model = model
        digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if digest in self._seen:
            raise Fault("duplicate_custom_id", "custom_id is that of a line before; give each its own", "custom_id")
        self._seen.add(digest)

    def _note(self, number: int | None, fault: Fault) -> None:
        self.faults.append({"code": fault.code, "line": number, "message": fault.message, "param": fault.param})


def parse(raw: bytes) -> dict[str, Any]:
    """A line as the JSON object that it is.

    Raises:
        Fault: it is none.
    """
    try:
        line = json.loads(raw.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Fault("invalid_json_line", "is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise Fault("invalid_json_line", "is no JSON") from error
    if not isinstance(line, dict):
        raise Fault("invalid_json_line", "is no JSON object")
    return line


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
