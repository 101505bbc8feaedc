"""Quantizes a model with llm-compressor; runs in the environment of `tests/clients/llm_compressor`.

Usage: python llm_compressor.py FOLDER WINDOWS OUTPUT --algorithm gptq [--bits 4] [--group-size 64] [--asymmetric]

Everything that the arguments do not name is as llm-compressor has it. Its last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

ALGORITHMS = ("gptq", "awq", "rtn", "smoothquant-w8a8", "w8a8")


def recipe(algorithm: str, bits: int, group_size: int, *, symmetric: bool) -> list[Any]:
    """The modifiers, in order. Those that end in `w8a8` round weights by channel and inputs by token."""
    if algorithm.endswith("w8a8"):
        rounding = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")
        return [SmoothQuantModifier(), rounding] if algorithm.startswith("smoothquant") else [rounding]
    weights = QuantizationArgs(num_bits=bits, strategy="group", group_size=group_size, symmetric=symmetric)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if algorithm == "gptq":
        return [GPTQModifier(ignore=["lm_head"], config_groups=groups)]
    rounding = QuantizationModifier(ignore=["lm_head"], config_groups=groups)
    return [AWQModifier(), rounding] if algorithm == "awq" else [rounding]


def main() -> None:
    """Quantize, save, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the float model")
    parser.add_argument("windows", type=Path, help="JSON: token ids of each calibration window")
    parser.add_argument("output", type=Path, help="folder to make, in compressed-tensors' format")
    parser.add_argument("--algorithm", choices=ALGORITHMS, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    options = parser.parse_args()
    windows = json.loads(options.windows.read_text())
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    modifiers = recipe(options.algorithm, options.bits, options.group_size, symmetric=not options.asymmetric)
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    if not torch.accelerator.is_available():
        # 0.14.0.1 pins AWQ's activations for a copy to a GPU, and fails where there is none.
        IntermediatesCache.pin_memory = lambda *_: None
    before = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        recipe=modifiers,
        dataset=Dataset.from_list(rows),
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, windows)),
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - before
    # ru_maxrss would count what the process that started this one held.
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    model.save_pretrained(options.output, save_compressed=True)
    tokenizer.save_pretrained(options.output)
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    found = {
        "seconds": seconds,
        "peak_bytes": int(peak) * 1024,
        "threads": torch.get_num_threads(),
        "tokens": sum(map(len, windows)),
        "versions": {name: version(name) for name in names},
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
