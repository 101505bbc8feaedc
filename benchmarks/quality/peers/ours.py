"""Quantizes a model with optkit as the scripts beside this one do with others; runs in the project's environment.

Usage: python ours.py FOLDER WINDOWS OUTPUT TRANSFORM...

Each TRANSFORM is `module:Class` or `module:Class{JSON of its options}`, in order, as
`optkit_quantize.gptq:GPTQ{"bits": 4, "granularity": "group", "group_size": 64}`. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import time
from importlib.metadata import version
from pathlib import Path

import torch

from optkit.calibration import Calibration
from optkit.transforms import Transform, TransformContext
from optkit.weights import load_folder, save_folder


def transform(text: str) -> Transform:
    """The transform that `text` names, with its options."""
    name, brace, options = text.partition("{")
    module, _, attribute = name.partition(":")
    made: Transform = getattr(importlib.import_module(module), attribute)(**json.loads(brace + options or "{}"))
    return made


def calibration(windows: list[list[int]]) -> Calibration:
    """One batch a window."""
    rows = [torch.tensor([window]) for window in windows]
    return Calibration(tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows))


def main() -> None:
    """Quantize, save, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the float model")
    parser.add_argument("windows", type=Path, help="JSON: token ids of each calibration window")
    parser.add_argument("output", type=Path, help="folder to make, in compressed-tensors' format")
    parser.add_argument("transforms", nargs="+")
    options = parser.parse_args()
    windows = json.loads(options.windows.read_text())
    model = load_folder(options.folder)
    transforms = [transform(text) for text in options.transforms]
    context = TransformContext(progress=lambda *_: None, calibration=calibration(windows))
    before = time.perf_counter()
    for one in transforms:
        model = one.apply(model, context)
    seconds = time.perf_counter() - before
    # ru_maxrss would count what the process that started this one held.
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    save_folder(model, options.output)
    found = {
        "seconds": seconds,
        "peak_bytes": int(peak) * 1024,
        "threads": torch.get_num_threads(),
        "tokens": sum(map(len, windows)),
        "versions": {name: version(name) for name in ("optkit", "transformers", "torch")},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
