"""llama.cpp's C interface: a model in memory, and contexts that run it and keep keys and values.

Functions: `llama.h` of llama.cpp, through the ctypes of `llama_cpp`.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from optkit.errors import DamagedError, MachineError

__all__ = ["MOST_SLOTS", "Context", "Weights", "cells"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]
See = Callable[[str, str, bool], None]
"""Is told the operation and the name of a node of the graph, before it runs (True) and after."""

MOST_SLOTS: int = llama_cpp.llama_max_parallel_sequences()
BATCH = 512
"""Tokens in one run; llama.cpp allocates for so many."""
_ERROR = 4  # ggml_log_level
_log = logging.getLogger(__name__)


class _Said:
    """What llama.cpp writes: to Python's log, and not to stderr; errors are kept for who asks."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.callback = llama_cpp.llama_log_callback(self._hear)
        llama_cpp.llama_log_set(self.callback, None)

    def _hear(self, level: int, text: bytes, _: object) -> None:
        line = text.decode(errors="replace").strip()
        if line:
            _log.debug("%s", line)
        if level == _ERROR and line:
            self.errors.append(line)

    def take(self) -> str:
        """The first error since the last time, which names the cause; those after it tell what failed with it."""
        errors, self.errors = self.errors, []
        return errors[0] if errors else "no reason given"


_said = _Said()
llama_cpp.llama_backend_init()


def cells(length: int) -> int:
    """Tokens that llama.cpp allocates for a slot of `length` tokens."""
    return -(-length // 256) * 256


class Weights:
    """A GGUF file, mapped.

    Raises:
        DamagedError: llama.cpp cannot load it.
    """

    def __init__(self, file: Path) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        _said.take()
        self.handle: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self.handle:
            version = llama_cpp.__version__
            raise DamagedError(f"llama-cpp-python {version} cannot load it: {_said.take()}", where=str(file))

    def close(self) -> None:
        if self.handle:
            llama_cpp.llama_model_free(self.handle)
        self.handle = None


class Context:
    """Runs a model, and keeps keys and values of sequences in slots that know nothing of each other.

    Args:
        weights: stay open as long as this does.
        slots: at most `MOST_SLOTS`.
        length: tokens of a slot.
        vocab_size: of the model.
        threads: that run one step.
        see: is told of every node of the graph, which makes each run by itself.

    Raises:
        MachineError: llama.cpp cannot allocate it.
    """

    def __init__(
        self, weights: Weights, slots: int, length: int, *, vocab_size: int, threads: int, see: See | None = None
    ) -> None:
        self._vocab_size = vocab_size
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx, params.kv_unified = slots, slots * cells(length), False
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.op_offload = params.offload_kqv = False
        params.no_perf = True
        if see is not None:
            params.cb_eval = self._watch = _watcher(see)
        _said.take()
        self._handle: Any = llama_cpp.llama_init_from_model(weights.handle, params)
        if not self._handle:
            raise MachineError(
                f"llama.cpp cannot make room for {slots} sequences of {length} tokens: {_said.take()}",
                remedy="lower max_length or max_batch_size, or free memory",
            )
        self._memory = llama_cpp.llama_get_memory(self._handle)
        # A batch has pointers to sequence ids, one for each token.
        self._ids = np.arange(slots, dtype=np.int32)

    def run(self, tokens: Integers, positions: Integers, slots: Integers, wanted: npt.NDArray[np.int8]) -> Floats:
        """Append tokens to their slots, and give the logits of those that are wanted.

        Args:
            tokens: `[tokens]`; those of one slot follow each other.
            positions: `[tokens]`, each in its own sequence; a slot's first is the number of tokens that it holds.
            slots: `[tokens]`.
            wanted: `[tokens]`, 1 or 0.

        Returns:
            `[wanted, vocabulary]`, in the order of the tokens.

        Raises:
            RuntimeError: llama.cpp refused them.
        """
        parts = [
            self._decode(tokens[part], positions[part], slots[part], wanted[part])
            for part in (slice(start, start + BATCH) for start in range(0, len(tokens), BATCH))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _decode(self, tokens: Integers, positions: Integers, slots: Integers, wanted: npt.NDArray[np.int8]) -> Floats:
        count = len(tokens)
        ones = np.ones(count, np.int32)
        pointers = self._ids.ctypes.data + self._ids.itemsize * slots.astype(np.uintp)
        batch = llama_cpp.llama_batch(
            n_tokens=count,
            token=_pointer(tokens, ctypes.c_int32),
            embd=None,
            pos=_pointer(positions, ctypes.c_int32),
            n_seq_id=_pointer(ones, ctypes.c_int32),
            seq_id=_pointer(pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(wanted, ctypes.c_int8),
        )
        _said.take()
        code = llama_cpp.llama_decode(self._handle, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}: {_said.take()}")
        shape = int(np.count_nonzero(wanted)), self._vocab_size
        if shape[0] == 0:
            return np.empty(shape, np.float32)
        logits = llama_cpp.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(logits, shape).copy()

    def keep(self, slot: int, length: int) -> None:
        """Forget what a slot holds beyond its first `length` tokens.

        Raises:
            RuntimeError: it holds fewer, over which llama.cpp would run on.
        """
        held = llama_cpp.llama_memory_seq_pos_max(self._memory, slot) + 1
        if held < length:
            raise RuntimeError(f"slot {slot} holds {held} tokens, not {length}")
        if held > length:
            llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1)

    def read(self, slot: int) -> npt.NDArray[np.uint8]:
        """What a slot holds, as llama.cpp stores it, to be written into any slot: `[bytes]`."""
        state = np.empty(llama_cpp.llama_state_seq_get_size(self._handle, slot), np.uint8)
        llama_cpp.llama_state_seq_get_data(self._handle, _pointer(state, ctypes.c_uint8), state.nbytes, slot)
        return state

    def write(self, slot: int, state: npt.NDArray[np.uint8]) -> None:
        """Let a slot hold what `read` gave.

        Raises:
            RuntimeError: it is not that.
        """
        self.keep(slot, 0)  # an empty state would leave what is there
        _said.take()
        if not llama_cpp.llama_state_seq_set_data(self._handle, _pointer(state, ctypes.c_uint8), state.nbytes, slot):
            raise RuntimeError(f"llama.cpp cannot restore a sequence: {_said.take()}")

    def close(self) -> None:
        if self._handle:
            llama_cpp.llama_free(self._handle)
        self._handle = None


def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
    """To the first number of an array, which must be contiguous and outlive it."""
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _watcher(see: See) -> Any:
    library: Any = llama_cpp.llama_cpp._lib
    describe, name = library.ggml_op_desc, library.ggml_get_name
    for function in (describe, name):
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p

    def tell(node: int, before: bool, _: object) -> bool:
        see(describe(node).decode(), name(node).decode(), before)
        return True

    return llama_cpp.ggml_backend_sched_eval_callback(tell)
