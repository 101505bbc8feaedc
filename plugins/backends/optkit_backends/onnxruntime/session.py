"""A compiled decoder as a session: slots of KV cache that the attention kernel writes in place."""

from __future__ import annotations

import math
import sys
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from optkit.backends import TokenSession
from optkit.errors import RecipeError
from optkit.steps import Caps, KernelTime, Limits, Row, StepPlan, StepResult
from optkit_backends.onnxruntime.files import GRAPH, Facts
from optkit_backends.onnxruntime.loading import load
from optkit_backends.onnxruntime.pages import huge_pages
from optkit_backends.onnxruntime.trace import kernel_times
from optkit_backends.room import blocks_that_fit

__all__ = ["OnnxSession"]

Floats = npt.NDArray[np.float32]
Layout = tuple[tuple[int, int, range], ...]
# Layouts that stay bound, the most recent ones: steps of decoding repeat theirs, those of prompts seldom do.
LAYOUTS = 64
# References to an array that one attribute holds, as `sys.getrefcount` sees it.
UNSHARED = 2
UNBOUND = 0


class OnnxSession(TokenSession):
    """Runs what `compile_module` wrote; see `optkit.backends.TokenSession`."""

    def __init__(self, directory: Path, limits: Limits, **settings: Any) -> None:
        facts = Facts.read(directory)
        if limits.max_length > facts.max_length:
            raise RecipeError(
                f"the model knows {facts.max_length} positions",
                found=limits.max_length,
                remedy=f"set max_length to {facts.max_length} or less",
            )
        self._graph = directory / GRAPH
        self._load = partial(_loaded, self._graph, **settings)
        self._session: Any = self._load()
        self._launches: dict[Layout, _Launch] = {}
        # Attention wants room for the padding of a step too: with one place more, an idle slot always has it.
        self._capacity = limits.max_length + 1
        shapes = [(heads, self._capacity, facts.head_dim) for heads in facts.kv_heads]
        most, tokens = limits.max_batch_size, limits.kv_cache_tokens
        slots = blocks_that_fit(
            limits,
            wanted=most if tokens is None else min(most, tokens // limits.max_length),
            block_size=limits.max_length,
            block_bytes=2 * sum(map(math.prod, shapes)) * np.dtype(facts.cache_dtype).itemsize,
        )
        # Zeros are pages that the kernel gives when they are written, so memory grows with use.
        self._cache: dict[str, npt.NDArray[np.generic]] = {
            f"{layer}.{kind}": np.zeros((slots, *shape), facts.cache_dtype)
            for layer, shape in enumerate(shapes)
            for kind in ("key", "value")
        }
        self.caps = Caps(
            kv="slot",
            block_size=limits.max_length,
            blocks=slots,
            max_batch_size=slots,
            mixed=True,
            vocab_size=facts.vocab_size,
            max_length=limits.max_length,
        )
        self._logits = _Logits(slots, facts.vocab_size)

    def execute(self, plan: StepPlan) -> StepResult:
        logits: dict[int, Floats] = {}
        for rows in _launches(plan.rows, self._capacity):
            logits |= self._launch(rows)(rows)
        return StepResult(tuple(logits[row.sequence] for row in plan.rows))

    def _launch(self, rows: Sequence[Row]) -> _Launch:
        layout = _layout(rows)
        launch = self._launches.pop(layout, None) or _Launch(self._session, self._cache, layout, self._logits)
        self._launches[layout] = launch
        if len(self._launches) > LAYOUTS:
            del self._launches[next(iter(self._launches))]
        return launch

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.generic]:
        # [slots, numbers]
        return np.concatenate([whole[list(blocks)].reshape(len(blocks), -1) for whole in self._cache.values()], axis=1)

    def write_blocks(self, blocks: Sequence[int], contents: npt.NDArray[np.generic]) -> None:
        start = 0
        for whole in self._cache.values():
            end = start + math.prod(whole.shape[1:])
            whole[list(blocks)] = contents[:, start:end].reshape(-1, *whole.shape[1:])
            start = end

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for whole in self._cache.values():
            for source, target in pairs:
                whole[target] = whole[source]

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        with tempfile.TemporaryDirectory() as folder:
            session = self._load(trace=Path(folder) / "trace")
            launches = [
                (_Launch(session, self._cache, _layout(rows), self._logits), rows)
                for rows in _launches(plan.rows, self._capacity)
            ]
            # Twice: the first run warms up. Both write the same keys and values to the same places.
            for launch, rows in launches * 2:
                launch(rows)
            return kernel_times(Path(session.end_profiling()), self._graph, runs=len(launches))

    def close(self) -> None:
        self._session = None
        self._launches.clear()
        self._cache.clear()


class _Logits:
    """Where logits are written: the same memory step after step, unless somebody still reads what lies there.

    Args:
        rows: of it, as many as a step of decoding wants. What wants more gets memory of its own.
        vocab_size: numbers in a row.
    """

    def __init__(self, rows: int, vocab_size: int) -> None:
        self._kept, self._version = np.empty((rows, vocab_size), np.float32), 1

    def take(self, rows: int) -> tuple[Floats, int]:
        """`[rows, vocabulary]`, and a number that stands for its address, or `UNBOUND` for memory of its own."""
        if rows > len(self._kept):
            return np.empty((rows, self._kept.shape[1]), np.float32), UNBOUND
        if sys.getrefcount(self._kept) > UNSHARED:  # views count
            self._kept, self._version = np.empty_like(self._kept), self._version + 1
        return self._kept[:rows], self._version


class _Launch:
    """A run of the graph for rows of one layout: which slots, how many new tokens each, and which logits.

    Everything that the layout decides is bound once; a step of the same layout only brings tokens and lengths.
    """

    def __init__(
        self, session: Any, cache: Mapping[str, npt.NDArray[np.generic]], layout: Layout, logits_memory: _Logits
    ) -> None:
        slots, counts, logits = zip(*layout, strict=True)
        first, width, tokens = min(slots), max(counts), sum(counts)
        window = max(slots) + 1 - first
        self._rows, self._counts = [slot - first for slot in slots], counts
        # Slots of the window without a row: no new token, and a cache that is said to hold one.
        query_seqlens = np.zeros(window, np.int32)
        query_seqlens[self._rows] = counts
        # What changes from step to step. No arrays of numpy: what a call costs counts where a step is of one token,
        # after which no code is in the caches.
        self._tokens, self._seqlens, self._total = array("q", [0] * tokens), array("i", [0] * window), array("i", [0])
        spread, places = np.zeros((window, width), np.int64), np.empty((tokens, 2), np.int64)
        kept: list[int] = []
        self._ends: list[int] = []
        start = 0
        for row, count, wanted in zip(self._rows, counts, logits, strict=True):
            end = start + count
            spread[row, :count] = np.arange(start, end)
            places[start:end, 0], places[start:end, 1] = row, np.arange(count)
            kept += range(start + wanted.start, start + wanted.stop)
            self._ends.append(len(kept))
            start = end
        self._width, self._logits = width, logits_memory
        self._wanted, self._bound = len(kept), UNBOUND
        # Bindings hold addresses only, so the arrays live here.
        self._inputs = {
            "tokens": np.frombuffer(self._tokens, np.int64),
            "spread": spread,
            "places": places,
            "seqlens_k": np.frombuffer(self._seqlens, np.int32),
            "query_seqlens": query_seqlens,
            "total_sequence_length": np.frombuffer(self._total, np.int32).reshape(()),
            "logit_rows": np.array(kept, np.int64),
        }
        self._session, self._binding = session, session.io_binding()
        for name, held in self._inputs.items():
            self._binding.bind_input(name, "cpu", 0, held.dtype, held.shape, held.ctypes.data)
        for name, whole in cache.items():
            view = whole[first : first + window]
            self._binding.bind_input(f"past.{name}", "cpu", 0, view.dtype, view.shape, view.ctypes.data)
            self._binding.bind_output(f"present.{name}", "cpu", 0, view.dtype, view.shape, view.ctypes.data)

    def __call__(self, rows: Sequence[Row]) -> dict[int, Floats]:
        """The logits of `rows`, which have this layout, by sequence."""
        self._tokens[:] = array("q", chain.from_iterable(row.tokens for row in rows))
        total = self._width
        for row, place, count in zip(rows, self._rows, self._counts, strict=True):
            length = row.computed + count
            self._seqlens[place] = length - 1
            total = max(total, length)
        self._total[0] = total
        logits, version = self._logits.take(self._wanted)
        if version != self._bound or version == UNBOUND:
            self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self._bound = version
        self._session.run_with_iobinding(self._binding)
        starts = [0, *self._ends]
        return {row.sequence: logits[a:b] for row, a, b in zip(rows, starts, self._ends, strict=False)}


def _loaded(graph: Path, **settings: Any) -> Any:
    with huge_pages():
        return load(graph, **settings)


def _layout(rows: Sequence[Row]) -> Layout:
    return tuple((row.blocks[0], len(row.tokens), row.wanted) for row in rows)


def _launches(rows: Sequence[Row], capacity: int) -> list[list[Row]]:
    """Rows that can run together: next to the widest of them, each one's padding must fit into its slot."""
    launches: list[list[Row]] = []
    left = sorted(rows, key=lambda row: -len(row.tokens))
    while left:
        width = len(left[0].tokens)
        launches.append([row for row in left if row.computed + width <= capacity])
        left = [row for row in left if row.computed + width > capacity]
    return launches
