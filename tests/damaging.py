"""What can happen to the files of a compiled model."""

from __future__ import annotations

import json

HARMS = ("cut", "gone", "garbage", "format", "facts")


def damage(harm, file, facts):
    """Do one of `HARMS` to a compiled file, or to the JSON file of its facts."""
    match harm:
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
        case "gone":
            file.unlink()
        case "garbage":
            file.write_bytes(b"x" * file.stat().st_size)
        case "format":
            facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": 99}))
        case "facts":
            facts.write_text("{")
