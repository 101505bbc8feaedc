"""Where the time of one step goes, kernel by kernel, held against what this machine can do."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from optkit import hardware
from optkit.artifact import Artifact
from optkit.backends import TensorSession, TokenSession
from optkit.engine.tensors import encodes_text, padded
from optkit.errors import RecipeError
from optkit.opening import files_of, open_files, token_session
from optkit.plugins import Plugins
from optkit.steps import KernelTime, Row, StepPlan

__all__ = ["ExplainedRow", "Explanation", "explain"]

_TOKENS = 64


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
    gflop_per_second: float
    """Operations of products with weights per second; 0 for kernels without."""
    of_ceiling: float
    """The larger of the two as a share of the machine's measured read bandwidth and matrix products, of int8 where the
    kernel's are. Where nobody could measure those it is 0."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What ran in one step."""

    what: str
    """The step, in words."""

    lowering: dict[str, dict[str, Any]]
    """By weight format, as the artifact's report has it."""
    rows: tuple[ExplainedRow, ...]
    """Longest first."""
    kernels: tuple[KernelTime, ...]
    """Every call, in order of execution."""
    seconds: float
    """Sum over all kernels; the profiler's own cost is part of it."""
    ceiling_gb_per_s: float
    ceiling_gflop_per_s: float
    ceiling_integer_gop_per_s: float
    """Of int8; 0 where this machine's could not be measured."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


def explain(
    artifact: Artifact,
    plugins: Plugins,
    peaks: hardware.Peaks,
    *,
    prompt_tokens: int | None = None,
    batch_size: int = 1,
) -> Explanation:
    """Profile one decode step of a causal language model, or one batch of an encoder or image classifier.

    Args:
        artifact: verified.
        plugins: to open it with.
        peaks: of this machine.
        prompt_tokens: tokens in the KV cache before the step, or of each sequence that is encoded; 64 by default, cut
            to what the artifact can hold. A model that reads no tokens has none.
        batch_size: sequences in the step, or rows of what a model of arrays reads.

    Raises:
        RecipeError: the artifact holds fewer sequences, its runtime takes no single steps, or it reads no tokens.
    """
    most = artifact.manifest.max_batch_size
    if batch_size > most:
        remedy = f"give --batch-size {most} or less"
        raise RecipeError("holds fewer at once", where=str(artifact.path), found=batch_size, remedy=remedy)
    rows_are = "sequences"
    session, _ = open_files(artifact.manifest.recipe, files_of(artifact), plugins)
    with session:
        if isinstance(session, TensorSession) and not encodes_text(session):
            if prompt_tokens is not None:
                what = "--prompt-tokens means nothing for it"
                raise RecipeError(what, where=str(artifact.path), remedy="leave it out")
            what, kernels = _computed(session, batch_size)
            rows_are = "rows"
        elif isinstance(session, TensorSession):
            length = min(prompt_tokens or _TOKENS, artifact.manifest.max_length)
            what, kernels = f"encoding of {length} tokens", _encoded(session, length, batch_size)
        else:
            length = min(prompt_tokens or _TOKENS, artifact.manifest.max_length - 1)
            single = token_session(session, artifact)
            what, kernels = f"decode step after {length} tokens", _decoded(single, length, batch_size)
    groups: dict[tuple[str, str], list[KernelTime]] = defaultdict(list)
    for kernel in kernels:
        groups[re.sub(r"\.\d+\.", ".*.", kernel.layer), kernel.kernel].append(kernel)
    whole = sum(kernel.seconds for kernel in kernels)
    rows = sorted((_row(*names, group, whole, peaks) for names, group in groups.items()), key=lambda row: -row.seconds)
    return Explanation(
        what if batch_size == 1 else f"{what}, {batch_size} {rows_are} at once",
        artifact.report()["lowering"],
        tuple(rows),
        tuple(kernels),
        whole,
        peaks.read_gb_per_s,
        peaks.fp32_gflops or 0.0,
        peaks.int8_gops or 0.0,
    )


def _decoded(session: TokenSession, length: int, batch_size: int) -> list[KernelTime]:
    """The kernels of a step that adds a token to each of some sequences."""
    caps = session.caps
    each = -(-(length + 1) // caps.block_size)
    rows = []
    for place in range(batch_size):
        blocks = tuple(range(place * each, (place + 1) * each))
        prompt = tuple((place + index) % caps.vocab_size for index in range(length))
        session.execute(StepPlan((Row(place, prompt, 0, blocks),)))
        rows.append(Row(place, (1 % caps.vocab_size,), length, blocks))
    return session.profile(StepPlan(tuple(rows)))


def _encoded(session: TensorSession, length: int, batch_size: int) -> list[KernelTime]:
    """The kernels of one call, of token 1 alone: it is in every vocabulary."""
    return session.profile(padded([(1,) * length] * batch_size, session.inputs))


def _computed(session: TensorSession, batch_size: int) -> tuple[str, list[KernelTime]]:
    """What is computed, in words, and the kernels of one call with random numbers of the sizes that inputs have.

    Raises:
        RecipeError: an input takes several sizes, of which none is more right than another.
    """
    random = np.random.default_rng(0)
    inputs, sizes = {}, []
    for name, spec in session.inputs.items():
        shape = [size for size in spec.shape[1:] if size is not None]
        if len(shape) != len(spec.shape) - 1:
            raise RecipeError("takes inputs of several sizes, so that none can be chosen", where=name)
        inputs[name] = random.normal(size=(batch_size, *shape)).astype(spec.dtype)
        sizes.append(f"{name} of {' x '.join(map(str, shape))}")
    return f"one call on {', '.join(sizes)}", session.profile(inputs)


def _row(layers: str, name: str, group: list[KernelTime], whole: float, peaks: hardware.Peaks) -> ExplainedRow:
    seconds = sum(kernel.seconds for kernel in group)
    read, operations = sum(kernel.weight_bytes for kernel in group), sum(kernel.operations for kernel in group)
    integer = sum(kernel.operations for kernel in group if kernel.integer)
    per_second = 1 / seconds if seconds else 0.0
    bounded = peaks.int8_gops is not None or not integer
    of_ceiling = peaks.least_seconds(read, operations - integer, integer) * per_second if bounded else 0.0
    share = seconds / whole if whole else 0.0
    gigas = per_second / 1e9
    return ExplainedRow(layers, name, len(group), seconds, share, read * gigas, operations * gigas, of_ceiling)
