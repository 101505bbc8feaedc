"""Where the time of one decode step goes, kernel by kernel, held against this machine's memory bandwidth."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from optkit import hardware
from optkit.artifact import Artifact
from optkit.opening import open_session
from optkit.plugins import Plugins
from optkit.steps import KernelTime, Row, StepPlan

__all__ = ["ExplainedRow", "Explanation", "explain"]


@dataclass(frozen=True, slots=True)
class ExplainedRow:
    """The same layer of all blocks, and the kernel that ran it."""

    layers: str
    """Module path with `*` for the number of the block."""
    kernel: str
    calls: int
    seconds: float
    share: float
    """Of the step's time."""
    gb_per_second: float
    """Weights read per second; 0 for kernels without weights."""
    of_ceiling: float
    """That as a share of the machine's measured read bandwidth."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ran in one decode step."""

    lowering: dict[str, dict[str, Any]]
    """By weight format, as the artifact's report has it."""
    rows: tuple[ExplainedRow, ...]
    """Longest first."""
    kernels: tuple[KernelTime, ...]
    """Every call, in order of execution."""
    seconds: float
    """Sum over all kernels; the profiler's own cost is part of it."""
    ceiling_gb_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


def explain(artifact: Artifact, plugins: Plugins, prompt_tokens: int, peaks: hardware.Peaks) -> Explanation:
    """Profile one decode step of one sequence.

    Its ceiling is memory bandwidth: each weight is read once, and used for one row only.

    Args:
        artifact: verified.
        plugins: to open it with.
        prompt_tokens: tokens in the KV cache before the step; cut to what the artifact can hold.
        peaks: of this machine.
    """
    with open_session(artifact, plugins) as (session, _):
        caps = session.caps
        length = min(prompt_tokens, artifact.manifest.max_length - 1)
        prompt = tuple(index % caps.vocab_size for index in range(length))
        blocks = tuple(range(-(-(length + 1) // caps.block_size)))
        session.execute(StepPlan((Row(0, prompt, 0, blocks),)))
        kernels = session.profile(StepPlan((Row(0, (1 % caps.vocab_size,), length, blocks),)))
    groups: dict[tuple[str, str], list[KernelTime]] = defaultdict(list)
    for kernel in kernels:
        groups[re.sub(r"\.\d+\.", ".*.", kernel.layer), kernel.kernel].append(kernel)
    whole = sum(kernel.seconds for kernel in kernels)
    rows = [_row(layers, name, group, whole, peaks.read_gb_per_s) for (layers, name), group in groups.items()]
    rows.sort(key=lambda row: -row.seconds)
    return Explanation(artifact.report()["lowering"], tuple(rows), tuple(kernels), whole, peaks.read_gb_per_s)


def _row(layers: str, name: str, group: list[KernelTime], whole: float, ceiling: float) -> ExplainedRow:
    seconds = sum(kernel.seconds for kernel in group)
    speed = sum(kernel.weight_bytes for kernel in group) / seconds / 1e9 if seconds else 0.0
    return ExplainedRow(layers, name, len(group), seconds, seconds / whole if whole else 0.0, speed, speed / ceiling)
