"""Quantizes a model with GPTQModel; runs in the environment of `tests/clients/gptqmodel`.

Usage: python gptq_model.py FOLDER WINDOWS OUTPUT [--bits 4] [--group-size 64] [--asymmetric] [--order static]

Everything that the arguments do not name is as GPTQModel has it. The output is a folder of float weights, those that
its integers stand for, as transformers alone cannot load its format. The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# By default it takes half of the cores, and 7.6.0 fails with less than two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import GPTQConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

ORDERS = {
    "group-aware": {"desc_act": False, "act_group_aware": True},
    "static": {"desc_act": True, "act_group_aware": False, "static_groups": True},
}
"""`group-aware` is its default; `static` is the order of our `act_order` and of llm-compressor's `static`."""


def main() -> None:
    """Quantize, save, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder of the float model")
    parser.add_argument("windows", type=Path, help="JSON: token ids of each calibration window")
    parser.add_argument("output", type=Path, help="folder to make, of float weights")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--order", choices=ORDERS, default="group-aware")
    options = parser.parse_args()
    windows = json.loads(options.windows.read_text())
    config = GPTQConfig(
        bits=options.bits,
        group_size=options.group_size,
        sym=not options.asymmetric,
        device="cpu",
        # The others compile C++ in the first run.
        pack_impl="original",
        **ORDERS[options.order],
    )
    model = GPTQModel.from_pretrained(str(options.folder), config, dtype=torch.float32)
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    before = time.perf_counter()
    model.quantize(rows, calibration_sort=None, batch_size=1)
    seconds = time.perf_counter() - before
    # ru_maxrss would count what the process that started this one held.
    [peak] = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    with tempfile.TemporaryDirectory() as packed:
        model.save_quantized(packed)
        save_float(Path(packed), options.folder, options.output)
    found = {
        "seconds": seconds,
        "peak_bytes": int(peak) * 1024,
        "threads": torch.get_num_threads(),
        "tokens": sum(map(len, windows)),
        "versions": {name: version(name) for name in ("gptqmodel", "transformers", "torch")},
    }
    print("\n" + json.dumps(found))


def save_float(packed: Path, folder: Path, output: Path) -> None:
    """Write the model of `folder` with the weights that those in `packed` stand for, in float32."""
    quantized = GPTQModel.load(str(packed), device="cpu", backend=BACKEND.GPTQ_TORCH)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = dict(model.named_modules())
    changed = 0
    for name, layer in quantized.model.named_modules():
        if hasattr(layer, "dequantize_weight"):
            # Stored in float16, but multiplied in float32 as everybody else's.
            layer.scales = layer.scales.float()
            layers[name].weight.data = layer.dequantize_weight().T.float().contiguous()
            changed += 1
    if not changed:
        raise SystemExit(f"no quantized layer in {packed}")
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)


if __name__ == "__main__":
    main()
