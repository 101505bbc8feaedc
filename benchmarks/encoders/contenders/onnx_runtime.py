"""ONNX Runtime's own dynamic int8, as its documentation says for transformers: fuse, then `quantize_dynamic`.

Usage: python onnx_runtime.py SEQUENCES GRAPH [TOKENS]

GRAPH is the float model as `exported.py` writes it. Everything but the names of files is as ONNX Runtime has it. With
TOKENS, a batch has that many at most, and not 32 sequences.
Document: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from turns import Floats, Integers, sequences, sorted_batches, take_turns

HEADS, HIDDEN = 12, 384


def main() -> None:
    rows, graph = sequences(), Path(sys.argv[2])
    most_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else None
    fused, quantized = graph.with_suffix(".fused.onnx"), graph.with_suffix(".int8.onnx")
    if not quantized.is_file():
        optimize_model(str(graph), "bert", HEADS, HIDDEN).save_model_to_file(str(fused))
        # Its shape inference does not know the fused operators, and asks for this type.
        quantize_dynamic(fused, quantized, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session: Any = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])

    def run(ids: Integers, mask: Integers) -> Floats:
        [hidden] = session.run(None, {"input_ids": ids, "attention_mask": mask})
        found: Floats = hidden
        return found

    take_turns(lambda: sorted_batches(rows, run, most_tokens), {"onnxruntime": onnxruntime.__version__})


if __name__ == "__main__":
    main()
