"""The process that `optkit.bench.memory` starts: a task as JSON on stdin, the answer as one JSON object on stdout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from optkit.bench.opening import Opening, open_arm
from optkit.errors import OptkitError
from optkit.opening import Files
from optkit.plugins import Plugins
from optkit.steps import Limits

__all__ = ["main", "peak_resident_bytes"]


def main() -> None:
    """Do the task and answer."""
    # Libraries greet on stdout; the answer keeps it for itself and sends them to stderr.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with answer:
        json.dump(_answer(json.load(sys.stdin)), answer)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    files = task["files"]
    if files is not None:
        files = Files(Path(files["runtime"]), Path(files["weights"]), Limits(**files["limits"]))
    try:
        arm = open_arm(Opening(task["recipe"], files), Plugins.load(block=task["block"]), "measured")
        arm.answer(task["request"])
    except OptkitError as error:
        return {
            "error": _tree_name(type(error)),
            "what": error.what,
            "where": error.where,
            "found": error.found if error.found is None else str(error.found),
            "remedy": error.remedy,
        }
    return {"peak_memory_bytes": peak_resident_bytes()}


def _tree_name(kind: type[OptkitError]) -> str:
    """The name of the error, or of its nearest ancestor in `optkit.errors` if a plugin made its own."""
    return next(k.__name__ for k in kind.__mro__ if k.__module__ == OptkitError.__module__)


def peak_resident_bytes() -> int:
    """The highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its maximum survives exec, so a child would answer with the size of its parent.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
