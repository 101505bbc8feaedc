"""Files, batches and answers as OpenAI's clients read them, made from what the store keeps.

https://platform.openai.com/docs/api-reference/batch/object
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Answer", "Line", "Usage", "Work", "answer_line", "batch_object", "expired_line", "file_object", "page"]

_TIMES = (
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


@dataclass(frozen=True, slots=True)
class Work:
    """A batch, as far as working on it goes."""

    seq: int
    """Its place in the queue."""
    id: str
    tenant: str
    salt: str
    input_file: str
    endpoint: str
    model: str | None
    status: str
    ending: str | None
    """The status that it will have when its files are there; no answer counts any more."""
    expires: int
    """Unix seconds."""

    @property
    def ended(self) -> bool:
        """Whether nothing about it changes any more."""
        return self.status in ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a batch, by where it is in the input file."""

    place: int
    """From 0."""
    start: int
    length: int
    """In bytes."""
    deaths: int
    """How often a worker died over it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Usage:
        """What an answer says, in the words of any endpoint."""
        usage = body.get("usage") or {}
        given = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        made = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
        return cls(
            usage.get("prompt_tokens", usage.get("input_tokens", 0)),
            given.get("cached_tokens") or 0,
            usage.get("completion_tokens", usage.get("output_tokens", 0)),
            made.get("reasoning_tokens") or 0,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a line came to."""

    batch: int
    place: int
    ok: bool
    """Whether it belongs into the output file; else into the error file."""
    text: str
    """The line of that file."""
    usage: Usage


def _answer_id(batch: str, place: int) -> str:
    return "batch_req_" + hashlib.blake2b(f"{batch}/{place}".encode(), digest_size=12).hexdigest()


def answer_line(batch: Work, place: int, custom_id: str, status: int, body: Mapping[str, Any]) -> Answer:
    """The answer to one line."""
    id = _answer_id(batch.id, place)
    response = {"status_code": status, "request_id": id, "body": body}
    text = _dumped({"id": id, "custom_id": custom_id, "response": response, "error": None})
    return Answer(batch.seq, place, status == 200, text, Usage.of(body) if status == 200 else Usage())


def expired_line(batch: Work, place: int, custom_id: str) -> str:
    """What stands in the error file for a line that nobody came to."""
    error = {"code": "batch_expired", "message": "the completion window ended before this request was answered"}
    id = _answer_id(batch.id, place)
    return _dumped({"id": id, "custom_id": custom_id, "response": None, "error": error})


def file_object(row: sqlite3.Row) -> dict[str, Any]:
    """OpenAI's `file`."""
    same = {key: row[key] for key in ("id", "bytes", "created_at", "filename", "purpose")}
    return {"object": "file", **same, "expires_at": None, "status": "processed", "status_details": None}


def batch_object(row: sqlite3.Row) -> dict[str, Any]:
    """OpenAI's `batch`."""
    faults = row["errors"]
    counts = {name: row[name] for name in ("total", "completed", "failed")}
    usage = {
        "input_tokens": row["input_tokens"],
        "input_tokens_details": {"cached_tokens": row["cached_tokens"]},
        "output_tokens": row["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": row["reasoning_tokens"]},
        "total_tokens": row["input_tokens"] + row["output_tokens"],
    }
    return {
        "id": row["id"],
        "object": "batch",
        "endpoint": row["endpoint"],
        "model": row["model"],
        "errors": None if faults is None else {"object": "list", "data": json.loads(faults)},
        "input_file_id": row["input_file"],
        "completion_window": "24h",
        "status": row["status"],
        "output_file_id": row["output_file"],
        "error_file_id": row["error_file"],
        "created_at": row["created_at"],
        **{name: row[name] for name in _TIMES},
        "request_counts": counts,
        "usage": usage,
        "metadata": None if row["metadata"] is None else json.loads(row["metadata"]),
    }


def page(found: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list of which one more than `limit` was looked for."""
    data = list(found[:limit])
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, **ends, "has_more": len(found) > limit}


def _dumped(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
