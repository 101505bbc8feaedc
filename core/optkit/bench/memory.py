"""Peak memory of one configuration, measured in a process of its own that does nothing else."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from optkit import errors
from optkit.bench.opening import Opening
from optkit.errors import MachineError, OptkitError
from optkit.plugins import Plugins

__all__ = ["peak_memory"]


def peak_memory(opening: Opening, plugins: Plugins, request: Mapping[str, Any]) -> int:
    """Highest resident memory, in bytes, of a fresh process that opens the model and answers one request.

    Python, its libraries and the work of loading are part of it: a machine must have room for them too.

    Args:
        opening: what to open.
        plugins: the process leaves out the same ones; it finds installed plugins only.
        request: in JSON; see `optkit.bench.Arm.answer`.

    Raises:
        MachineError: the process was killed, as the kernel does when memory runs out.
        OptkitError: what it met, as `optkit.bench.opening.open_arm` would raise it here.
    """
    task = {**asdict(opening), "block": plugins.blocked, "request": request}
    child = subprocess.run(
        [sys.executable, "-m", "optkit.bench.child"],
        input=json.dumps(task, default=str),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode == -signal.SIGKILL:
        raise MachineError(
            "the process that measures memory was killed, most likely because memory ran out",
            remedy="lower max_length or max_batch_size, or take a larger machine",
        )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OptkitError(f"the process that measures memory ended with code {child.returncode}: {last}")
    answer: dict[str, Any] = json.loads(child.stdout)
    if "error" in answer:
        kind: type[OptkitError] = getattr(errors, answer.pop("error"))
        raise kind(**answer)
    return int(answer["peak_memory_bytes"])
