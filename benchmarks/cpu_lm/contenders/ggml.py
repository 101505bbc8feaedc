"""llama.cpp with a GGUF file of its own quantizer: all prompts first, then a token of every sequence in each step.

Usage: python ggml.py WORKLOADS FILE THREADS; in an environment of `ggml.txt`
       python ggml.py quantize FLOAT_FILE FILE TYPE; TYPE is of `llama_ftype`, such as MOSTLY_Q8_0

That is how llama.cpp's own `llama-batched-bench` and its server run sequences. Everything that is not named here is as
llama.cpp has it. Functions: `llama.h`, through the ctypes of `llama_cpp`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np
from turns import Floats, Generator, Request, take_turns

SEQUENCES, LENGTH = 64, 768  # at once, and tokens of each
BATCH = 2048
Entry = tuple[int, int, int, bool]
"""A token, its position, its sequence, and whether its logits are wanted."""


class LlamaCpp(Generator):
    """A model in one context."""

    def __init__(self, file: str, threads: int) -> None:
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model: Any = llama_cpp.llama_model_load_from_file(file.encode(), model)
        assert self._model
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max, params.n_ctx, params.n_batch = SEQUENCES, SEQUENCES * LENGTH, BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        assert self._context
        vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size: int = llama_cpp.llama_vocab_n_tokens(vocab)
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def generate(self, requests: list[Request]) -> Iterator[list[tuple[int, int]]]:
        llama_cpp.llama_memory_clear(self._memory, True)
        # A prompt's last token goes with its others, so that it is computed in one piece where it fits.
        prompts = [
            (token, position, sequence, position == len(request.prompt) - 1)
            for sequence, request in enumerate(requests)
            for position, token in enumerate(request.prompt)
        ]
        came: list[tuple[int, int]] = []
        for start in range(0, len(prompts), BATCH):
            if now := self._next(prompts[start : start + BATCH]):
                yield now
                came += now
        for step in range(1, max(request.output for request in requests)):
            ahead = [
                (token, len(requests[sequence].prompt) + step - 1, sequence, True)
                for sequence, token in came
                if step < requests[sequence].output
            ]
            came = self._next(ahead)
            yield came

    def logits(self, tokens: list[int]) -> Floats:
        llama_cpp.llama_memory_clear(self._memory, True)
        return self._run([(token, position, 0, True) for position, token in enumerate(tokens)]).copy()

    def _next(self, entries: Sequence[Entry]) -> list[tuple[int, int]]:
        """The likeliest next tokens of the sequences whose logits are wanted."""
        wanted = [sequence for _, _, sequence, want in entries if want]
        found = self._run(entries).argmax(1).tolist()
        return list(zip(wanted, found, strict=True))

    def _run(self, entries: Sequence[Entry]) -> Floats:
        """`[wanted, vocabulary]`, until the next run."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, want) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, want
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = llama_cpp.llama_decode(self._context, batch)
        assert code == 0, code
        wanted = sum(want for *_, want in entries)
        if not wanted:
            return np.empty((0, self._vocab_size), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (wanted, self._vocab_size))


def quantize(source: str, target: str, kind: str) -> None:
    """Write a GGUF file as llama.cpp's own tool `llama-quantize` does."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    assert code == 0, code


def main() -> None:
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
        return
    threads = int(sys.argv[3])
    take_turns(LlamaCpp(sys.argv[2], threads), {"threads": threads, "llama-cpp-python": version("llama-cpp-python")})


if __name__ == "__main__":
    main()
