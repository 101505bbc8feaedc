"""Times steps of the native kernels with each instruction set of this machine, in every format.

Usage: python benchmarks/cpu_lm/instructions.py [--layers N] [--threads N] [--seconds S] [--portable] [--output FILE]

The model has SmolLM2-135M's shapes and random weights: time does not depend on them. Sets and formats are interleaved
in every round, in one process, which `taskset` may tie to cores. Writes JSON, and a table beside it; with `--table`
it writes the table of a file alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optkit import hardware
from optkit.bench import median_ratio
from optkit.builtin.huggingface import HuggingFace
from optkit.quantized import ActivationScheme, QuantizedLinear, WeightScheme, replace_module
from optkit.steps import Limits, Row, StepPlan
from optkit.weights import save_folder
from optkit_backends.torch.native import building
from optkit_backends.torch.native.layout import Instructions
from optkit_backends.torch.native.session import NativeSession

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
TOKENWISE = ActivationScheme(dynamic=True)
FORMATS: dict[str, tuple[WeightScheme, ActivationScheme | None] | None] = {
    "float32": None,
    "int8, int8 inputs": (WeightScheme(8, None, symmetric=True), TOKENWISE),
    "int8 in groups of 64": (WeightScheme(8, 64, symmetric=True), None),
    "int4 in groups of 32, int8 inputs": (WeightScheme(4, 32, symmetric=True), TOKENWISE),
    "int4 in groups of 32": (WeightScheme(4, 32, symmetric=True), None),
}
LIMITS = Limits(max_batch_size=64, max_length=640)
BLOCKS = 40  # of each sequence
STEPS = {
    **{
        f"decode {rows}": StepPlan(
            tuple(Row(r, (7 + r,), 64, tuple(range(r * BLOCKS, (r + 1) * BLOCKS))) for r in range(rows))
        )
        for rows in (1, 16, 64)
    },
    "prefill 512": StepPlan((Row(0, tuple(range(5, 517)), 0, tuple(range(BLOCKS))),)),
}
REPEATS = {"decode 1": 6, "decode 16": 2}


def quantized(module: Any, scheme: WeightScheme, activations: ActivationScheme | None) -> None:
    """Put random integers in place of every linear layer."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            out, features = layer.weight.shape
            bound = 1 << (scheme.bits - 1)
            weight = torch.randint(-bound, bound, (out, features), dtype=torch.int8)
            scale = torch.full((out, features // (scheme.group_size or features)), 0.02 / bound)
            replace_module(module, name, QuantizedLinear(weight, scale, None, None, scheme, activations))


def opened(layers: int, threads: int, sets: list[Instructions]) -> dict[tuple[str, str], NativeSession]:
    """A session for every format and set."""
    found = {}
    with TemporaryDirectory() as folder:
        for name, scheme in FORMATS.items():
            torch.manual_seed(0)
            module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SHAPE)).eval().requires_grad_(False)
            module.save_pretrained(folder)
            model = HuggingFace(model=folder).load()
            if scheme is not None:
                quantized(model.module, *scheme)
            place = Path(folder) / name.replace(" ", "-")
            place.mkdir()
            save_folder(model, place)
            for one in sets:
                found[name, one.title] = NativeSession(place, LIMITS, threads=threads, instructions=one)
    return found


def measured(sessions: dict[tuple[str, str], NativeSession], seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of every step, in rounds of all."""
    for plan in STEPS.values():
        for session in sessions.values():
            session.execute(plan)
    taken: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for step, plan in STEPS.items():
            for (name, title), session in sessions.items():
                for _ in range(REPEATS.get(step, 1)):
                    begin = time.perf_counter()
                    session.execute(plan)
                    taken[step, name, title].append(round(1e3 * (time.perf_counter() - begin), 3))
    return [
        {"step": step, "format": name, "instructions": title, "ms": ms} for (step, name, title), ms in taken.items()
    ]


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine = data["machine"]
    times = {(row["step"], row["format"], row["instructions"]): np.array(row["ms"]) for row in data["times"]}
    titles = list(dict.fromkeys(title for *_, title in times))
    lines = [
        "<!-- Written by benchmarks/cpu_lm/instructions.py; run it again instead of editing. -->",
        "",
        "# Steps of the native kernels by instruction set",
        "",
        f"SmolLM2-135M's shapes ({data['layers']} layers), {data['threads']} threads of {machine['cpu']}",
        f"({', '.join(machine['isa'])}). Medians in ms of one interleaved run; ratios with 95% intervals.",
        "",
        f"| step | format | {' | '.join(titles)} | {titles[-1]} over {titles[0]} |",
        "|---|---|" + "---:|" * (len(titles) + 1),
    ]
    for step, name in dict.fromkeys((step, name) for step, name, _ in times):
        runs = [times[step, name, title] for title in titles]
        ratio = median_ratio(np.log(runs[0]) - np.log(runs[-1]))
        cells = [f"{np.median(ms):.1f}" for ms in runs]
        lines.append(
            f"| {step} | {name} | {' | '.join(cells)} | {ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=hardware.usable_cores())
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--portable", action="store_true", help="what every processor of the platform has, too")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    if asked.table:
        data = json.loads(asked.output.read_text())
    else:
        best = building.best_instructions()
        least = Instructions.PORTABLE if asked.portable else Instructions.AVX2
        sets = [one for one in Instructions if least <= one <= best] or [best]
        sessions = opened(asked.layers, asked.threads, sets)
        data = {
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": asdict(hardware.machine()),
            "threads": asked.threads,
            "layers": asked.layers,
            "times": measured(sessions, asked.seconds),
        }
        asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    asked.output.with_suffix(".md").write_text(table(data), encoding="utf-8")
    print(table(data))


if __name__ == "__main__":
    main()
