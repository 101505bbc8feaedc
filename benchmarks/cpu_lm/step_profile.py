"""Where one decode step of an artifact goes, kernel by kernel, beside what this machine's memory would allow.

Usage: python benchmarks/cpu_lm/step_profile.py ARTIFACT [--repeat N] [--prompt-tokens N] [--output FILE]

`optkit explain` profiles the step in a process of its own, several times over; medians are kept. Writes JSON, and a
picture beside it: a bar for each kind of layer, and in it a mark where the bar would end if the layer's weights came
as fast as memory can be read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from optkit import hardware

PRODUCT, OTHER, MARK = "#3b4cc0", "#c9ced6", "#d1495b"


def explained(artifact: Path, repeat: int, prompt_tokens: int) -> list[dict[str, Any]]:
    """What `optkit explain` says, so many times."""
    command = [
        sys.executable,
        "-m",
        "optkit.cli",
        "explain",
        str(artifact),
        "--json",
        f"--prompt-tokens={prompt_tokens}",
    ]
    return [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeat)]


def report(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by kind of layer and kernel, in the order of the first run."""
    by_kind = defaultdict(list)
    for run in runs:
        for row in run["rows"]:
            by_kind[row["layers"], row["kernel"]].append(row)
    rows = [
        {"layers": layers, "kernel": kernel, "calls": found[0]["calls"]}
        | {key: float(np.median([row[key] for row in found])) for key in ("seconds", "gb_per_second", "of_ceiling")}
        for (layers, kernel), found in by_kind.items()
    ]
    return {
        "machine": asdict(hardware.machine()),
        "step": runs[0]["what"],
        "runs": len(runs),
        "read_gb_per_s": float(np.median([run["ceiling_gb_per_s"] for run in runs])),
        "seconds": float(np.median([run["seconds"] for run in runs])),
        "rows": sorted(rows, key=lambda row: -row["seconds"]),
    }


def draw(data: dict[str, Any], file: Path) -> None:
    """Write the picture of a report, in the format that the file's suffix names."""
    rows = data["rows"][::-1]
    with matplotlib.rc_context({"svg.hashsalt": "profile", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 0.8 + 0.34 * len(rows)), layout="constrained")
        axes = figure.subplots()
        ms = [1e3 * row["seconds"] for row in rows]
        axes.barh(range(len(rows)), ms, color=[PRODUCT if row["gb_per_second"] else OTHER for row in rows], height=0.7)
        for place, row in enumerate(rows):
            told = f"{1e3 * row['seconds']:.2f} ms"
            if row["gb_per_second"]:
                least = 1e3 * row["seconds"] * row["gb_per_second"] / data["read_gb_per_s"]
                axes.plot([least, least], [place - 0.35, place + 0.35], color=MARK, linewidth=2)
                told += f", {row['gb_per_second']:.1f} GB/s, {row['gb_per_second'] / data['read_gb_per_s']:.0%}"
            axes.annotate(told, (ms[place], place), xytext=(4, 0), textcoords="offset points", va="center")
        names = [row["layers"].removeprefix("model.").removeprefix("layers.*.") for row in rows]
        axes.set_yticks(range(len(rows)), [_label(name, row) for name, row in zip(names, rows, strict=True)])
        axes.set_xlim(0, max(ms) * 1.5)
        axes.set_xlabel("ms of the step, all blocks together; red: weights read at the full speed of memory")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        machine = data["machine"]
        figure.suptitle(
            f"{data['step']}: {1e3 * data['seconds']:.2f} ms on {machine['cores']} cores of {machine['cpu']}, "
            f"which read {data['read_gb_per_s']:.1f} GB/s",
            fontsize=10,
        )
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _label(name: str, row: dict[str, Any]) -> str:
    return name if row["gb_per_second"] else f"{name}: {row['kernel'].removeprefix('native ')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--repeat", type=int, default=11)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    data = report(explained(asked.artifact, asked.repeat, asked.prompt_tokens))
    asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    draw(data, asked.output.with_suffix(".svg"))
    for row in data["rows"]:
        print(f"{1e3 * row['seconds']:7.3f} ms  {row['gb_per_second']:5.1f} GB/s  {row['layers']}  {row['kernel']}")


if __name__ == "__main__":
    main()
