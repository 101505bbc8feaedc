"""A compiled decoder as a session: slots of KV cache that the attention kernel writes in place."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from optkit import hardware
from optkit.backends import TokenSession
from optkit.errors import DamagedError, MachineError, RecipeError
from optkit.steps import Caps, KernelTime, Limits, Row, StepPlan, StepResult
from optkit_backends.onnxruntime.files import GRAPH, Facts

__all__ = ["OnnxSession"]

# Keys and values of one window of slots are bound once; each window keeps 4 bindings per layer.
WINDOWS = 64


class OnnxSession(TokenSession):
    """Runs what `compile_module` wrote; see `optkit.backends.TokenSession`."""

    def __init__(self, directory: Path, limits: Limits, threads: int) -> None:
        facts = Facts.read(directory)
        if limits.max_length > facts.max_length:
            raise RecipeError(
                f"the model knows {facts.max_length} positions",
                found=limits.max_length,
                remedy=f"set max_length to {facts.max_length} or less",
            )
        self.caps = Caps(
            kv="slot",
            block_size=limits.max_length,
            blocks=limits.max_batch_size,
            max_batch_size=limits.max_batch_size,
            mixed=True,
            vocab_size=facts.vocab_size,
        )
        # Attention wants room for the padding of a step too: with one place more, an idle slot always has it.
        self._capacity = limits.max_length + 1
        shape = (limits.max_batch_size, facts.kv_heads, self._capacity, facts.head_dim)
        needed, free = 2 * facts.layers * int(np.prod(shape)) * 4, hardware.memory().available
        if needed > free:
            raise MachineError(
                f"the KV cache needs {needed >> 20} MiB and {free >> 20} are free",
                remedy="lower max_batch_size or max_length",
            )
        self._directory, self._threads = directory, threads
        self._session: Any = _load(directory, threads)
        self._bindings: dict[tuple[int, int], Any] = {}
        self._cache = {
            f"{layer}.{kind}": np.zeros(shape, np.float32) for layer in range(facts.layers) for kind in ("key", "value")
        }

    def execute(self, plan: StepPlan) -> StepResult:
        logits: dict[int, npt.NDArray[np.float32]] = {}
        for rows in _launches(plan.rows, self._capacity):
            launch = _Launch(rows, self.caps.vocab_size)
            window = (launch.first, launch.slots)
            if window not in self._bindings:
                if len(self._bindings) == WINDOWS:
                    self._bindings.pop(next(iter(self._bindings)))
                self._bindings[window] = self._bound(self._session, *window)
            launch.run(self._session, self._bindings[window])
            logits |= launch.split()
        return StepResult(tuple(logits[row.sequence] for row in plan.rows))

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        return []

    def close(self) -> None:
        self._session = None
        self._bindings.clear()
        self._cache.clear()

    def _bound(self, session: Any, first: int, slots: int) -> Any:
        binding = session.io_binding()
        for name, cache in self._cache.items():
            view = cache[first : first + slots]
            binding.bind_input(f"past.{name}", "cpu", 0, np.float32, view.shape, view.ctypes.data)
            binding.bind_output(f"present.{name}", "cpu", 0, np.float32, view.shape, view.ctypes.data)
        return binding


class _Launch:
    """One run of the graph: some rows of a step, laid out as its inputs."""

    def __init__(self, rows: Sequence[Row], vocab_size: int) -> None:
        self._rows = sorted(rows, key=lambda row: row.blocks[0])
        slots = [row.blocks[0] for row in self._rows]
        self.first, self.slots = slots[0], slots[-1] - slots[0] + 1
        counts = [len(row.tokens) for row in self._rows]
        # Slots of the window that are not in the step: no new token, and a length that says one old one.
        seqlens, query_seqlens = np.zeros(self.slots, np.int32), np.zeros(self.slots, np.int32)
        spread = np.zeros((self.slots, max(counts)), np.int64)
        places, kept, start = np.empty((sum(counts), 2), np.int64), [], 0
        self._counts = []
        for row, slot, count in zip(self._rows, slots, counts, strict=True):
            index, end = slot - self.first, start + count
            seqlens[index], query_seqlens[index] = row.computed + count - 1, count
            spread[index, :count] = np.arange(start, end)
            places[start:end, 0], places[start:end, 1] = index, np.arange(count)
            wanted = {"none": end, "last": end - 1, "all": start}[row.logits]
            kept += range(wanted, end)
            self._counts.append(end - wanted)
            start = end
        self._inputs = {
            "tokens": np.array([token for row in self._rows for token in row.tokens], np.int64),
            "spread": spread,
            "places": places,
            "seqlens_k": seqlens,
            "query_seqlens": query_seqlens,
            "total_sequence_length": np.array(max(int(seqlens.max()) + 1,spread.shape[1]), np.int32),
            "logit_rows": np.array(kept, np.int64),
        }
        self._logits = np.empty((len(kept), vocab_size), np.float32)

    def run(self, session: Any, binding: Any) -> None:
        for name, array in self._inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        session.run_with_iobinding(binding)

    def split(self) -> dict[int, npt.NDArray[np.float32]]:
        """The logits of each row, by sequence."""
        parts = np.split(self._logits, np.cumsum(self._counts)[:-1])
        return {row.sequence: part for row, part in zip(self._rows, parts, strict=True)}


def _launches(rows: Sequence[Row], capacity: int) -> list[list[Row]]:
    """Rows that can run together: next to the widest of them, each one's padding must fit into its slot."""
    launches: list[list[Row]] = []
    left = sorted(rows, key=lambda row: -len(row.tokens))
    while left:
        width = len(left[0].tokens)
        launches.append([row for row in left if row.computed + width <= capacity])
        left = [row for row in left if row.computed + width > capacity]
    return launches


def _load(directory: Path, threads: int, profile: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    # Other engines run between steps: idle threads must leave them the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return onnxruntime.InferenceSession(directory / GRAPH, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DamagedError(f"onnxruntime cannot load it: {error}", where=str(directory / GRAPH)) from error
