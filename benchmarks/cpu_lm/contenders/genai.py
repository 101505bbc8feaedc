"""onnxruntime-genai with the model of its own builder, in the loop that its documentation shows.

Usage: python genai.py WORKLOADS FOLDER THREADS; in an environment of `genai.txt`

Requests make one batch, padded on the right to the longest prompt; it runs until the longest output is there.
Everything that is not named here is as onnxruntime-genai has it.
Document: https://onnxruntime.ai/docs/genai/api/python.html
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import onnxruntime_genai
from turns import Floats, Generator, Request, take_turns

AT_ONCE = 16  # its batch may have 32 rows, each of which costs as many steps as the longest
PADDING = 2  # SmolLM2's pad token, by which the library knows how long each prompt is


class GenAI(Generator):
    """A folder of the model builder."""

    def __init__(self, folder: str, threads: int) -> None:
        config: Any = onnxruntime_genai.Config(folder)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model: Any = onnxruntime_genai.Model(config)

    def generate(self, requests: list[Request]) -> Iterator[list[tuple[int, int]]]:
        longest = max(request.output for request in requests)
        generator = self._generator([request.prompt for request in requests], longest)
        for _ in range(longest):
            generator.generate_next_token()
            yield list(enumerate(generator.get_next_tokens().tolist()))

    def logits(self, tokens: list[int]) -> Floats:
        found: Floats = self._generator([tokens], 1).get_output("logits")[0]
        return found

    def _generator(self, prompts: list[list[int]], output: int) -> Any:
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), PADDING, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        params: Any = onnxruntime_genai.GeneratorParams(self._model)
        # As short as it is long: an end token does not end it.
        length = width + output
        params.set_search_options(max_length=length, min_length=length, batch_size=len(prompts), do_sample=False)
        generator: Any = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(ids)
        return generator


def main() -> None:
    folder, threads = sys.argv[2], int(sys.argv[3])
    libraries = ("onnxruntime-genai", "onnxruntime")
    about = {"threads": threads, "at_once": AT_ONCE, **{name: version(name) for name in libraries}}
    take_turns(GenAI(folder, threads), about)


if __name__ == "__main__":
    main()
