"""Measures every quantizer on SmolLM2-135M: quality on text that calibration never saw, size, time and memory.

Usage: python benchmarks/quality/quantizers.py [--only PATTERN] [--device cuda] [--output FILE]

Writes JSON after every row, and a table beside it. Rows that are there already, made with the same settings on the same
machine, are kept. Each row runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from judging import CONTEXT, LENGTH, MODEL, DeviceScorer, Problem, in_processes
from rows import Rows

Transforms = dict[str, list[dict[str, Any]]]


def group(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"bits": bits, "granularity": "group", "group_size": size, **more}


def rows() -> Transforms:
    """Name -> transforms, as a recipe spells them. The wide group is 192: 128 does not divide SmolLM2's 576."""
    found: Transforms = {"none": []}
    for algorithm in ("rtn", "hqq", "awq", "gptq"):
        for bits, size in ((8, 64), (4, 192), (4, 64), (3, 192), (3, 64)):
            found[f"{algorithm} {bits}-bit group {size}"] = [{f"quantize.{algorithm}": group(bits, size)}]
        for bits in (4, 3):
            name = f"{algorithm} {bits}-bit group 64 asymmetric"
            found[name] = [{f"quantize.{algorithm}": group(bits, 64, symmetric=False)}]
    found["rtn 8-bit channel"] = [{"quantize.rtn": {"bits": 8}}]
    smooth = {"quantize.smoothquant": {}}
    found |= {
        "int8_dynamic": [{"quantize.int8_dynamic": {}}],
        "smoothquant, int8_dynamic": [smooth, {"quantize.int8_dynamic": {}}],
        **{
            f"int8_static {observer}": [{"quantize.int8_static": {"observer": observer}}]
            for observer in ("minmax", "histogram", "mse")
        },
        "int8_static percentile 99.99": [{"quantize.int8_static": {"observer": "percentile", "percentile": 99.99}}],
        "smoothquant, int8_static minmax": [smooth, {"quantize.int8_static": {"observer": "minmax"}}],
        "fp8 dynamic": [{"quantize.fp8": {"activations": "dynamic"}}],
        "fp8 static": [{"quantize.fp8": {"activations": "static"}}],
        "w4a8": [{"quantize.w4a8": {}}],
        "smoothquant, w4a8": [smooth, {"quantize.w4a8": {}}],
        "rotate": [{"quantize.rotate": {}}],
        "rotate, rtn 4-bit group 64": [{"quantize.rotate": {}}, {"quantize.rtn": group(4, 64)}],
        "rotate, gptq 4-bit group 64": [{"quantize.rotate": {}}, {"quantize.gptq": group(4, 64)}],
        "rotate, int8_dynamic": [{"quantize.rotate": {}}, {"quantize.int8_dynamic": {}}],
        "mixed 4.5 bits, rtn": [{"quantize.mixed": {"effective_bits": 4.5, "algorithm": "rtn"}}],
        "mixed 4.5 bits, gptq": [{"quantize.mixed": {"effective_bits": 4.5, "algorithm": "gptq"}}],
        "bitsandbytes nf4": [{"quantize.bitsandbytes": {"format": "nf4"}}],
        "bitsandbytes fp4": [{"quantize.bitsandbytes": {"format": "fp4"}}],
        "bitsandbytes int8": [{"quantize.bitsandbytes": {"format": "int8"}}],
        "kv_cache int8 head": [{"quantize.kv_cache": {"dtype": "int8", "granularity": "head"}}],
        "kv_cache fp8 head": [{"quantize.kv_cache": {"dtype": "fp8", "granularity": "head"}}],
        "kv_cache int8 tensor": [{"quantize.kv_cache": {"dtype": "int8", "granularity": "tensor"}}],
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose names match this regular expression")
    parser.add_argument("--tokens", type=int, default=2048, help="of evaluation text")
    parser.add_argument("--samples", type=int, default=16, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--device", default="cpu", help="where to quantize and to judge, as torch names it")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--model", default=MODEL, help="the GGUF file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row is not None:
        print(json.dumps(measured(asked)))
        return
    settings = {
        "model": {"gguf": {"file": asked.model}},
        "evaluation_tokens": asked.tokens,
        "calibration_samples": asked.samples,
        "sequence_length": LENGTH,
        "device": asked.device,
        "rows_at_once": asked.jobs,
    }
    made = Rows(asked.output, settings, rows(), table)
    chosen = [name for name in rows() if re.search(asked.only, name) and name not in made]
    with tempfile.TemporaryDirectory() as scratch:
        for name, row in in_processes(chosen, asked.jobs, "--scratch", scratch):
            made.add(name, row)
            print(f"{name}: perplexity {row['metrics']['perplexity']['ratio']['value']:.4f}x", flush=True)
    print(f"wrote {asked.output}")


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    from optkit import hardware
    from optkit.calibration import Calibration
    from optkit.evaluate import Scorer, SessionScorer
    from optkit.measure import folder_bytes
    from optkit.steps import Limits
    from optkit.transforms import TransformContext
    from optkit.weights import save_folder

    # Rows that run at once must not write the same files.
    kept = asked.scratch / ("baseline" if asked.jobs == 1 else f"baseline-{os.getpid()}")
    torch.set_num_threads(hardware.usable_cores())
    problem = Problem(asked.model, tokens=asked.tokens, samples=asked.samples, device=asked.device, kept=kept)
    recipe, model, calibration = problem.recipe(rows()[asked.row]), problem.model, problem.calibration
    _ = problem.baseline
    before = _resident()
    _reset_peak()
    begin, spent = time.perf_counter(), time.process_time()
    for use in recipe.transforms:
        data = calibration if use.options.calibration else Calibration()
        model = use.options.apply(model, TransformContext(lambda *_: None, data, device=asked.device))
    seconds, spent, peak = time.perf_counter() - begin, time.process_time() - spent, _peak()
    folder = asked.scratch / f"weights-{os.getpid()}"
    save_folder(model, folder)
    candidate: Scorer = DeviceScorer(model.module, asked.device)
    if any(tag.startswith("kv:") for tag in model.tags):
        from optkit_backends.torch import Torch

        session = Torch().open(folder, folder, Limits(1, CONTEXT))
        candidate = SessionScorer(session)  # type: ignore[arg-type]
    quality = problem.quality(candidate)
    size = folder_bytes(folder)
    shutil.rmtree(folder)
    if asked.jobs > 1:
        shutil.rmtree(kept)
    return {
        "transforms": recipe.resolved()["transforms"],
        "tags": sorted(model.tags),
        "seconds": seconds,
        "cpu_seconds": spent,
        "memory_before_bytes": before,
        "peak_memory_bytes": peak,
        "size_bytes": size,
        **quality.to_dict(),
    }


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    settings, machine = data["settings"], data["machine"]
    names = ("torch", "transformers", "compressed-tensors")
    libraries = ", ".join(f"{name} {machine['libraries'].get(name, '?')}" for name in names)
    device = ", ".join(found["name"] for found in machine["devices"]) if settings["device"] != "cpu" else machine["cpu"]
    lines = [
        "<!-- Written by benchmarks/quality/quantizers.py; run it again instead of editing. -->",
        "",
        "# Quantizers on SmolLM2-135M-Instruct",
        "",
        f"Judged on {settings['evaluation_tokens']} tokens, in windows of {CONTEXT}; calibrated on "
        f"{settings['calibration_samples']} windows of {LENGTH} that share no text with them. Machine: {device}, "
        f"{machine['cores']} cores; {libraries}. Ratios are to the float32 model, with 95% intervals; KL in nats. "
        "CPU seconds are of all threads together. Memory is what the process grew by while it quantized. "
        + (
            "" if settings["rows_at_once"] == 1 else f"{settings['rows_at_once']} rows ran at once: seconds say little."
        ),
        "",
        "| transforms | perplexity ratio | KL mean | KL p99 | same top token | size MB | CPU seconds | memory MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        metrics = row["metrics"]
        ratio = metrics["perplexity"]["ratio"]
        grown = max(0, row["peak_memory_bytes"] - row["memory_before_bytes"])
        cells = (
            name,
            f"{ratio['value']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]",
            f"{metrics['kl']['value']:.4f}",
            f"{metrics['kl_p99']['value']:.3f}",
            f"{100 * metrics['top1_agreement']['value']:.1f}%",
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['cpu_seconds']:.1f}" if "cpu_seconds" in row else "-",  # not measured in the first rows
            f"{grown / 1e6:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
