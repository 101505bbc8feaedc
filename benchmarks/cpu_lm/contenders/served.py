"""vLLM's build for processors, its engine in processes of its own as `vllm serve` has it.

Usage: python served.py WORKLOADS FOLDER THREADS; in an environment of `served.txt`

Inputs and what is not quantized are float32: vLLM has no product in bfloat16 for processors without AVX-512, and leaves
it to torch. Everything that is not named here is as vLLM has it, so it compiles the model as it opens it.
Document: https://docs.vllm.ai/en/latest/getting_started/installation/cpu/
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from turns import Floats, Generator, Request, take_turns

DTYPE = "float32"
CACHE_GB, LENGTH = 2, 640
PRELOADED = str(Path(sys.prefix, "lib/libiomp5.so"))
SITE = Path(__file__).resolve().parents[3] / "tests/clients/vllm_cpu/site"


class Served(Generator):
    """A folder that transformers could load."""

    def __init__(self, folder: str) -> None:
        import vllm

        self._sampling: Any = vllm.SamplingParams
        # A prompt that comes twice is computed twice.
        args = vllm.EngineArgs(folder, dtype=DTYPE, max_model_len=LENGTH, enable_prefix_caching=False, max_logprobs=-1)
        self._engine: Any = vllm.LLMEngine.from_engine_args(args)
        self._ids = map(str, itertools.count())

    def generate(self, requests: list[Request]) -> Iterator[list[tuple[int, int]]]:
        from vllm.sampling_params import RequestOutputKind

        numbers = {}
        for number, request in enumerate(requests):
            kind = {"detokenize": False, "output_kind": RequestOutputKind.DELTA}
            numbers[self._add(request.prompt, max_tokens=request.output, ignore_eos=True, **kind)] = number
        while self._engine.has_unfinished_requests():
            came = [
                (numbers[output.request_id], token)
                for output in self._engine.step()
                for token in output.outputs[0].token_ids
            ]
            if came:
                yield came

    def logits(self, tokens: list[int]) -> Floats:
        """Logarithms of probabilities, which are logits too. They come sorted, without a row for the last token."""
        self._add([*tokens, 0], max_tokens=1, detokenize=False, prompt_logprobs=-1)
        logits = None
        while self._engine.has_unfinished_requests():
            came = self._engine.engine_core.get_output().outputs
            for output in came:
                if (found := output.new_prompt_logprobs_tensors) is not None:
                    # Beyond here they would become objects of Python, some gigabytes of them.
                    output.new_prompt_logprobs_tensors = None
                    ids, values = found.logprob_token_ids[:, 1:].numpy(), found.logprobs[:, 1:].numpy()
                    logits = np.empty(values.shape, np.float32)
                    np.put_along_axis(logits, ids.astype(np.int64), values, 1)
            self._engine.output_processor.process_outputs(came)
        assert logits is not None
        return logits

    def _add(self, prompt: list[int], **params: Any) -> str:
        name = next(self._ids)
        self._engine.add_request(name, {"prompt_token_ids": prompt}, self._sampling(temperature=0, **params))
        return name


def settings(threads: int) -> dict[str, str]:
    """Environment variables; those with `VLLM_` and the library are of its document."""
    return {
        "LD_PRELOAD": PRELOADED,
        "PYTHONPATH": str(SITE),
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_NO_USAGE_STATS": "1",
    }


def main() -> None:
    folder, threads = sys.argv[2], int(sys.argv[3])
    if PRELOADED not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings(threads))  # noqa: S606
    take_turns(Served(folder), {"threads": threads, "dtype": DTYPE, "vllm-cpu": version("vllm-cpu")})


if __name__ == "__main__":
    main()
