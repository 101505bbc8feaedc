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
        self._data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        recorded = self._data.get("machine")
        # Libraries that are not recorded took no part.
        same = recorded and recorded == machine | {
            "libraries": {name: machine["libraries"].get(name) for name in recorded["libraries"]}
        }
        if self._data.get("settings") != settings or not same:
            self._data = {"settings": settings, "machine": machine, "rows": {}}

    def __contains__(self, name: str) -> bool:
        return name in self._data["rows"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Take in a row, and write both files."""
        rows = self._data["rows"] | {name: row | {"measured": datetime.now(UTC).isoformat(timespec="seconds")}}
        self._data["rows"] = {key: rows[key] for key in self._order if key in rows}
        self._file.write_text(json.dumps(self._data, indent=1) + "\n", encoding="utf-8")
        self._file.with_suffix(".md").write_text(self._table(self._data), encoding="utf-8")
