"""OpenVINO with int8 by NNCF, as its documentation says for transformers: weights and activations, with calibration.

Usage: python open_vino.py SEQUENCES GRAPH CALIBRATION HINT; in an environment with openvino and nncf

GRAPH is the float model as `exported.py` writes it, CALIBRATION a JSON list of token ids that share no text with
SEQUENCES, HINT is LATENCY or THROUGHPUT: one batch after the other, or as many at the same time as OpenVINO says is
best. Everything that is not named here is as NNCF and OpenVINO have it.
Document: https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
from turns import Floats, Integers, padded_batches, pooled, sequences, sorted_batches, take_turns


def quantized(graph: Path, calibration: Path, hint: str) -> Any:
    file = graph.with_suffix(".int8.xml")
    core = openvino.Core()
    if not file.is_file():
        samples = [np.array([ids], np.int64) for ids in json.loads(calibration.read_text())]
        inputs = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in samples]
        data, kind = nncf.Dataset(inputs), nncf.ModelType.TRANSFORMER
        with redirect_stdout(sys.stderr):  # it tells there how far it is
            model = nncf.quantize(core.read_model(graph), data, model_type=kind, subset_size=len(inputs))
        openvino.save_model(model, file)
    hints = {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
    return core.compile_model(core.read_model(file), "CPU", hints)


def main() -> None:
    rows, hint = sequences(), sys.argv[4]
    compiled = quantized(Path(sys.argv[2]), Path(sys.argv[3]), hint)
    calls = openvino.AsyncInferQueue(compiled)  # as many as the model wants

    def run(ids: Integers, mask: Integers) -> Floats:
        found: Floats = compiled({"input_ids": ids, "attention_mask": mask})[0]
        return found

    def at_once() -> Floats:
        found: dict[int, Floats] = {}

        def keep(request: Any, batch: tuple[list[int], Integers]) -> None:
            found.update(zip(batch[0], pooled(request.get_output_tensor(0).data, batch[1]), strict=True))

        calls.set_callback(keep)
        for chosen, ids, mask in padded_batches(rows):
            calls.start_async({"input_ids": ids, "attention_mask": mask}, (chosen, mask))
        calls.wait_all()
        return np.stack([found[index] for index in range(len(rows))])

    about = {"openvino": openvino.__version__, "nncf": nncf.__version__, "requests": len(calls)}
    take_turns(at_once if hint == "THROUGHPUT" else lambda: sorted_batches(rows, run), about)


if __name__ == "__main__":
    main()
