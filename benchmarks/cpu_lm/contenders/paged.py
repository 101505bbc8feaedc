"""OpenVINO GenAI's continuous batching with weights that NNCF made int8, as its documentation advises.

Usage: python paged.py WORKLOADS FOLDER THREADS; in an environment of `paged.txt`
       python paged.py compress FLOAT_FOLDER FOLDER

Everything that is not named here is as OpenVINO has it. Logits are those of the graph outside of the pipeline.
Documents: https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/weight-compression.html and
https://docs.openvino.ai/2026/openvino-workflow-generative/inference-with-genai.html
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from turns import Floats, Generator, Request, take_turns

GRAPH = "openvino_model.xml"
CACHE_GB = 4
NOTHING = 1 << 30  # no token has this id


class Paged(Generator):
    """A folder with a stateful graph."""

    def __init__(self, folder: str, threads: int) -> None:
        import openvino_genai

        self._genai = openvino_genai
        self._folder, self._properties = folder, {"INFERENCE_NUM_THREADS": threads}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", self._properties, {}, {}
        )
        self._ids = itertools.count()
        self._graph: Any = None

    def generate(self, requests: list[Request]) -> Iterator[list[tuple[int, int]]]:
        handles = []
        for request in requests:
            config = self._genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos = request.output, True
            config.eos_token_id, config.stop_token_ids = NOTHING, {NOTHING}  # the graph's folder names none
            ids = openvino.Tensor(np.array([request.prompt], np.int64))
            handles.append(self._pipeline.add_request(next(self._ids), ids, config))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            came = [
                (number, token) for number, handle in enumerate(handles) for tokens in _read(handle) for token in tokens
            ]
            if came:
                yield came

    def logits(self, tokens: list[int]) -> Floats:
        if self._graph is None:
            compiled = openvino.Core().compile_model(Path(self._folder) / GRAPH, "CPU", self._properties)
            self._graph = compiled.create_infer_request()
        self._graph.reset_state()
        inputs = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        found: Floats = self._graph.infer(inputs)["logits"][0].copy()
        return found


def _read(handle: Any) -> Iterator[list[int]]:
    while handle.can_read():
        for output in handle.read().values():
            yield output.generated_ids


def compress(source: str, target: str) -> None:
    """All weights to int8 with a zero point for each channel, which is the default."""
    import nncf

    model = openvino.Core().read_model(Path(source) / GRAPH)
    openvino.save_model(nncf.compress_weights(model), Path(target) / GRAPH, compress_to_fp16=False)


def main() -> None:
    if sys.argv[1] == "compress":
        compress(*sys.argv[2:])
        return
    threads = int(sys.argv[3])
    about = {name: version(name) for name in ("openvino", "openvino-genai")}
    take_turns(Paged(sys.argv[2], threads), {"threads": threads, **about})


if __name__ == "__main__":
    main()
