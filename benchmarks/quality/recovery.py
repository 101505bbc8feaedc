"""Measures what each pruner costs SmolLM2-135M and saves of its file, and what `prune.recover` wins back.

Usage: python benchmarks/quality/recovery.py [--only PATTERN] [--steps N] [--device cuda] [--jobs N] [--output FILE]

Judged on text that neither learnt from. The pruners are those of pruners.py, which measures speed. On two cores 200
steps take a quarter of an hour a row, on a GPU a minute. Writes JSON after every row, and a table beside it; rows that
are there already, made with the same settings on the same machine, are kept.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from judging import CONTEXT, MODEL, DeviceScorer, Problem
from pruners import of_decoder
from rows import Rows

from optkit import hardware, measure
from optkit.transforms import TransformContext
from optkit.weights import save_folder

if TYPE_CHECKING:
    from optkit.model import Model

LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose names match this regular expression")
    parser.add_argument("--steps", type=int, default=200, help="of prune.recover")
    parser.add_argument("--tokens", type=int, default=4096, help="of evaluation text")
    parser.add_argument("--samples", type=int, default=256, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--device", default="cpu", help="where to prune, recover and judge, as torch names it")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    settings = {
        "model": {"gguf": {"file": MODEL}},
        "evaluation_tokens": asked.tokens,
        "calibration_samples": asked.samples,
        "sequence_length": LENGTH,
        "steps": asked.steps,
        "device": asked.device,
        "rows_at_once": asked.jobs,
    }
    made = Rows(asked.output, settings, of_decoder(), table)
    chosen = [name for name in of_decoder() if re.search(asked.only, name) and name not in made]
    # Read once, before the forks. By one thread: those of OpenMP do not live on in a child.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as kept:
        problem = Problem(
            MODEL, tokens=asked.tokens, samples=asked.samples, length=LENGTH, device=asked.device, kept=Path(kept)
        )
        _ = problem.calibration
        threads = max(1, hardware.usable_cores() // asked.jobs)
        with ProcessPoolExecutor(asked.jobs, get_context("fork"), begin, (problem, threads)) as pool:
            running = {pool.submit(measured, name, asked.steps): name for name in chosen}
            for ended in as_completed(running):
                name = running[ended]
                if (failure := ended.exception()) is not None:
                    print(f"{name} failed: {failure}", file=sys.stderr, flush=True)
                    continue
                made.add(name, ended.result())
                print(f"{name}: {' | '.join(cells(ended.result()))}", flush=True)
    print(f"wrote {asked.output}")


_problem: Problem  # of a child


def begin(problem: Problem, threads: int) -> None:
    """Begin a child's work: it is forked from the process that read the problem."""
    global _problem
    _problem = problem
    torch.set_num_threads(threads)
    problem.kept /= str(os.getpid())


def measured(name: str, steps: int) -> dict[str, Any]:
    """One row, in a child."""
    problem = _problem
    recipe = problem.recipe([*of_decoder()[name], {"prune.recover": {"steps": steps, "at_least": None}}])
    _ = problem.baseline
    model = replace(problem.model, module=copy.deepcopy(problem.model.module))
    told: list[str] = []
    found = []
    for use in recipe.transforms:
        started = time.perf_counter()
        context = TransformContext(lambda *said: told.append(said[2]), problem.calibration, device=problem.device)
        model = use.options.apply(model, replace(context, baseline=problem.model))
        seconds = time.perf_counter() - started
        quality = problem.quality(DeviceScorer(model.module, problem.device)).to_dict()
        model.module.to("cpu")
        found.append({"step": use.name, "seconds": seconds, "told": told[-1], **quality})
    weights = list(model.module.parameters())
    return {
        "transforms": recipe.resolved()["transforms"],
        "tags": sorted(model.tags),
        "parameters": sum(weight.numel() for weight in weights),
        "zeros": sum(int((weight == 0).sum()) for weight in weights),
        **sizes(model),
        "steps": found,
    }


def sizes(model: Model) -> dict[str, int]:
    """Bytes of the folder of a model, as it is and compressed."""
    with tempfile.TemporaryDirectory() as folder:
        save_folder(model, Path(folder))
        return {
            "weight_bytes": measure.folder_bytes(Path(folder)),
            "compressed_bytes": measure.compressed_bytes(Path(folder)),
        }


def cells(row: dict[str, Any]) -> list[str]:
    """Of one line of the table, without its name."""
    ratios = [step["metrics"]["perplexity"]["ratio"] for step in row["steps"]]
    before, after = (math.log(ratio["value"]) for ratio in ratios)
    return [
        *(f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" for ratio in ratios),
        f"{1 - after / before:.0%}" if before > 0.005 else "-",
        *(f"{step['metrics']['kl']['value']:.3f}" for step in row["steps"]),
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['zeros'] / row['parameters']:.0%}",
        *(f"{row[size] / 1e6:.1f}" for size in ("weight_bytes", "compressed_bytes")),
    ]


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    settings, machine = data["settings"], data["machine"]
    libraries = ", ".join(f"{name} {machine['libraries'].get(name, '?')}" for name in ("torch", "transformers"))
    device = machine["cpu"] if settings["device"] == "cpu" else machine["devices"][0]["name"]
    told = (
        f"Judged on {settings['evaluation_tokens']} tokens, in windows of {CONTEXT}. Pruned and recovered with "
        f"{settings['calibration_samples']} windows of {settings['sequence_length']} that share no text with them; "
        f"recovery is `prune.recover` with {settings['steps']} steps of 512 tokens. Ratios are to the whole model, "
        "with 95% intervals; KL in nats. Won back is the share of the lost log-perplexity. Zeros are of all weights, "
        f"embeddings too. Sizes are of the recovered weights, as stored and compressed by zlib. Machine: {device}, "
        f"{machine['cores']} cores; {libraries}."
    )
    names = [
        "method",
        "perplexity",
        "recovered",
        "won back",
        "KL",
        "recovered",
        "parameters M",
        "zeros",
        "size MB",
        "compressed MB",
    ]
    lines = [
        "<!-- Written by benchmarks/quality/recovery.py; run it again instead of editing. -->",
        "",
        "# Pruners on SmolLM2-135M-Instruct, and their recovery",
        "",
        told,
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
        *(f"| {name} | {' | '.join(cells(row))} |" for name, row in data["rows"].items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
