"""A compiled decoder as a session: one slot of llama.cpp's KV cache for each sequence."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from optkit.backends import TokenSession
from optkit.errors import MachineError, RecipeError
from optkit.steps import Caps, KernelTime, Limits, StepPlan, StepResult
from optkit_backends.llama_cpp.files import MODEL, Facts
from optkit_backends.llama_cpp.runtime import MOST_SLOTS, Context, Weights, cells
from optkit_backends.room import blocks_that_fit

__all__ = ["LlamaCppSession"]

KEPT_BYTES = 2  # float16
# What llama.cpp calls the products of a decoder layer, and transformers the layers.
PRODUCTS = {
    "Qcur": "self_attn.q_proj",
    "Kcur": "self_attn.k_proj",
    "Vcur": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_out": "mlp.down_proj",
}


class LlamaCppSession(TokenSession):
    """Runs what `export_gguf` wrote; see `optkit.backends.TokenSession`.

    Raises:
        DamagedError: a file is missing, cut short, or llama.cpp cannot load it.
        MachineError: not enough memory for `limits`.
        RecipeError: sequences of `limits.max_length` are longer than the model can hold.
    """

    def __init__(self, directory: Path, limits: Limits, *, threads: int) -> None:
        facts = Facts.read(directory)
        if limits.max_length > facts.max_length:
            raise RecipeError(
                f"the model takes {facts.max_length} tokens",
                found=limits.max_length,
                remedy=f"set max_length to {facts.max_length} or less",
            )
        self._facts = facts
        self._weights = Weights(directory / MODEL)
        token_bytes = facts.kv_values_per_token * KEPT_BYTES
        try:
            slots = _slots(limits, token_bytes)
            self._new_context = partial(Context, self._weights, slots, vocab_size=facts.vocab_size, threads=threads)
            self._context = self._new_context(limits.max_length)
        except MachineError:
            self._weights.close()
            raise
        # Beside keys and values, a state has the position and owner of each token, and headings of each layer.
        self._state_bytes = limits.max_length * (token_bytes + 16) + 64 * (len(facts.linears) + 1)
        self.caps = Caps(
            kv="slot",
            block_size=limits.max_length,
            blocks=slots,
            max_batch_size=slots,
            mixed=True,
            vocab_size=facts.vocab_size,
            max_length=limits.max_length,
        )

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(_run(self._context, plan))

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.generic]:
        # [slots, bytes]: the length of a state, and the state. Zeros are pages that the kernel gives when written.
        contents = np.zeros((len(blocks), 8 + self._state_bytes), np.uint8)
        for row, slot in zip(contents, blocks, strict=True):
            state = self._context.read(slot)
            row[:8].view(np.uint64)[0] = state.nbytes
            row[8 : 8 + state.nbytes] = state
        return contents

    # `copy_blocks` goes through these too: llama_memory_seq_cp only notes the copy, for when the next step begins, and
    # the source may have changed by then.
    def write_blocks(self, blocks: Sequence[int], contents: npt.NDArray[np.generic]) -> None:
        for slot, row in zip(blocks, np.ascontiguousarray(contents, np.uint8), strict=True):
            self._context.write(slot, row[8 : 8 + int(row[:8].view(np.uint64)[0])])

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        times = _Times(self._facts.linears)
        # A context of its own, as a context that watches runs the nodes of every step one by one.
        context = self._new_context(max(row.computed + len(row.tokens) for row in plan.rows), see=times.see)
        try:
            for row in plan.rows:
                context.write(row.blocks[0], self._context.read(row.blocks[0]))
            _run(context, plan)  # warm up; to run a row again writes the same keys and values
            times.found.clear()
            _run(context, plan)
            for row in plan.rows:
                self._context.write(row.blocks[0], context.read(row.blocks[0]))
        finally:
            context.close()
        return times.found

    def close(self) -> None:
        self._context.close()
        self._weights.close()


def _slots(limits: Limits, token_bytes: int) -> int:
    """How many sequences the cache can hold."""
    most, tokens = min(limits.max_batch_size, MOST_SLOTS), limits.kv_cache_tokens
    return blocks_that_fit(
        limits,
        wanted=most if tokens is None else min(most, tokens // limits.max_length),
        block_size=limits.max_length,
        block_bytes=cells(limits.max_length) * token_bytes,
    )


def _run(context: Context, plan: StepPlan) -> tuple[npt.NDArray[np.float32], ...]:
    """The logits of each row."""
    # Filler need not be computed: what is not there is not seen.
    texts = [row.tokens[: len(row.tokens) - row.padding] for row in plan.rows]
    for row in plan.rows:
        context.keep(row.blocks[0], row.computed)
    counts = np.array([len(text) for text in texts])
    starts = counts.cumsum() - counts
    computed = np.array([row.computed for row in plan.rows])
    positions = np.arange(counts.sum()) + (computed - starts).repeat(counts)
    slots = np.array([row.blocks[0] for row in plan.rows], np.int32).repeat(counts)
    wanted = np.zeros(len(positions), np.int8)
    for row, start in zip(plan.rows, starts, strict=True):
        wanted[start + row.wanted.start : start + row.wanted.stop] = 1
    tokens = np.array([token for text in texts for token in text], np.int32)
    logits = context.run(tokens, positions.astype(np.int32), slots, wanted)
    return tuple(np.split(logits, np.cumsum([len(row.wanted) for row in plan.rows])[:-1]))


class _Times:
    """Notes how long the nodes of a graph take, in order."""

    def __init__(self, linears: dict[str, tuple[str, int]]) -> None:
        self._linears = linears
        self._start = 0.0
        self.found: list[KernelTime] = []

    def see(self, operation: str, name: str, before: bool) -> None:
        now = time.perf_counter()
        if before:
            self._start = now
            return
        path = _path(name) if operation == "MUL_MAT" else ""
        weights, size = self._linears.get(path, ("", 0))
        kernel = f"{operation} ({weights} weights)" if weights else operation
        self.found.append(KernelTime(path if weights else name, kernel, now - self._start, size))


def _path(node: str) -> str:
    """The linear layer whose product a node is, if it is one: `Qcur-3` is that of `model.layers.3.self_attn.q_proj`."""
    if node == "result_output":
        return "lm_head"
    product, _, layer = node.partition("-")
    return f"model.layers.{layer}.{PRODUCTS.get(product, product)}"
