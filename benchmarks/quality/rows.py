"""The rows of a measured table: JSON that is written after every row, and the table as Markdown beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optkit import hardware

__all__ = ["Rows"]


class Rows:
    """Measured rows in a file. Those that are there, made with the same settings on the same machine, are kept.

    Machines are the same with the same processor, devices, Python and libraries, and as many cores and GiB: a ratio of
    one run does not depend on the build of the system, which each row has.

    Args:
        file: the JSON file; the table goes beside it, with the suffix `.md`.
        settings: what all rows have in common.
        order: names of all rows that may be.
        table: the contents of the file as Markdown.
    """

    def __init__(
        self, file: Path, settings: dict[str, Any], order: Iterable[str], table: Callable[[dict[str, Any]], str]
    ) -> None:
        self._file, self._order, self._table = file, list(order), table
        machine = json.loads(json.dumps(asdict(hardware.machine())))
        del machine["memory"]["available"]
        self._empty = {"settings": settings, "machine": machine, "rows": {}}
        self._data = self._read()

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        same = found.get("settings") == self._empty["settings"] and _alike(self._empty["machine"], found["machine"])
        return found if same else self._empty

    def __contains__(self, name: str) -> bool:
        return name in self._data["rows"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Take in a row, and write both files."""
        self._data = self._read()  # another process may have added some
        made = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "system": self._empty["machine"]["system"]}
        rows = self._data["rows"] | {name: row | made}
        self._data["rows"] = {key: rows[key] for key in self._order if key in rows}
        self._file.write_text(json.dumps(self._data, indent=1) + "\n", encoding="utf-8")
        self._file.with_suffix(".md").write_text(self._table(self._data), encoding="utf-8")


def _alike(machine: dict[str, Any], recorded: dict[str, Any]) -> bool:
    def compared(facts: dict[str, Any]) -> dict[str, Any]:
        # Libraries that are not recorded took no part.
        libraries = {name: facts["libraries"].get(name) for name in recorded["libraries"]}
        gigabytes = round(facts["memory"]["total"] / 2**30)
        return facts | {"libraries": libraries, "memory": gigabytes, "system": None}

    return compared(machine) == compared(recorded)
