"""How the cost of a step of the native kernels grows: with concurrency, with what the KV cache holds, with the model.

Usage: python benchmarks/cpu_lm/growth.py WORK [--prepare] [--blocks N] [--only PATTERN] [--output FILE]

Steps that decode one token of 1, 4, 16 and 64 sequences, each after 128; of one sequence of 512, 2048 and 8192 and of
16 of 512 and 2048; and that take in the last 512 tokens of a prompt of 512, 2048 and 8192. Beside each the least that
this machine could take (`optkit sys`): weights, keys and values read once from main memory, or the products, float or
int8, by torch's fastest; whichever is longer. SmolLM2-135M, and a Llama of TinyLlama's shape with random weights: time
depends on no value.

A block opens every variant once, in a random order, one at a time for want of memory, and takes the median of every
step. No two sequences share keys and values: a short prompt's are copied into all blocks of the cache.

WORK keeps models and the blocks measured so far, and more blocks go on from there, or none; `--prepare` makes models
alone, so that a quiet machine is wanted for the timing alone. The machine's ceilings are measured in every run that
times, and the best count. Writes JSON, and a table and a picture beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import growth_picture
import numpy as np
import torch
from cpu_lm import HALF_BYTES, MODEL, NATIVE, TOKENWISE
from transformers import LlamaConfig, LlamaForCausalLM

from optkit import hardware
from optkit.backends import Backend, TokenSession
from optkit.bench import Estimate, median_ratio
from optkit.builtin.gguf import GGUF
from optkit.calibration import Calibration
from optkit.model import Model
from optkit.opening import bound
from optkit.plugins import Plugins
from optkit.steps import KernelTime, Limits, Row, StepPlan
from optkit.transforms import TransformContext
from optkit.weights import save_folder

SMALL, LARGE = "SmolLM2-135M", "Llama of 1.1B"
TINYLLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,  # TinyLlama's own is 2048
}
ROTATE, TOKENS, BFLOAT16_KV = TOKENWISE  # random weights are as good unrotated
# The format that gptq with int8 activations gives, without its data and minutes.
HALVES = {"quantize.w4a8": {"group_size": HALF_BYTES["group_size"], "ignore": []}}
INT8_KV = {"quantize.kv_cache": {"dtype": "int8"}}
SHORT, CHUNK, LONGEST = 128, 512, 8192
SECONDS = 0.4
"""Each step is repeated for so long in a block, or a few times if it takes long."""


@dataclass(frozen=True)
class Variant:
    """A model in a format.

    Args:
        model: a name of `MODELS`.
        format: what it is called.
        transforms: as recipes have them; what they learn is learnt from noise.
        backend: likewise.
    """

    model: str
    format: str
    transforms: tuple[dict[str, Any], ...]
    backend: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.format}"


VARIANTS = (
    Variant(SMALL, "float32", (), NATIVE),
    Variant(SMALL, "int8", (ROTATE, TOKENS), NATIVE),
    Variant(SMALL, "int8, bfloat16 KV", (ROTATE, TOKENS, BFLOAT16_KV), NATIVE),
    Variant(SMALL, "int8, int8 KV", (ROTATE, TOKENS, INT8_KV), NATIVE),
    Variant(SMALL, "int4", (HALVES,), NATIVE),
    Variant(LARGE, "int8", (TOKENS,), NATIVE),
)


@dataclass(frozen=True)
class Work:
    """A step: the last `tokens` of `rows` sequences of `context` tokens."""

    rows: int
    tokens: int
    context: int

    def plan(self, block_size: int) -> StepPlan:
        each, new = -(-self.context // block_size), tuple(range(5, 5 + self.tokens))
        return StepPlan(
            tuple(
                Row(row, new, self.context - self.tokens, tuple(range(row * each, (row + 1) * each)))
                for row in range(self.rows)
            )
        )

    @property
    def seen(self) -> int:
        """Positions that all new tokens together attend to."""
        return self.rows * sum(range(self.context - self.tokens + 1, self.context + 1))


CONCURRENT = tuple(Work(rows, 1, SHORT + 1) for rows in (1, 4, 16, 64))
# 16 sequences of 8192 would take 6 GB.
DEEP = tuple(Work(rows, 1, context) for rows, context in ((1, 512), (1, 2048), (1, LONGEST), (16, 512), (16, 2048)))
CHUNKS = tuple(Work(1, CHUNK, context) for context in (CHUNK, 2048, LONGEST))
WORKS = (*CONCURRENT, *DEEP, *CHUNKS)
LIMITS = Limits(max(work.rows for work in WORKS), LONGEST, max(work.rows * work.context for work in WORKS))


def random_llama() -> Model:
    """Of TinyLlama's shape."""
    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(**TINYLLAMA)).eval().requires_grad_(False)
    return Model(module, None, frozenset({"task:causal-lm", "arch:llama", "weights:float"}))


MODELS: dict[str, Callable[[], Model]] = {SMALL: lambda: GGUF(file=MODEL).load(), LARGE: random_llama}


def prepare(work: Path, variants: list[Variant], plugins: Plugins) -> None:
    """The folders of weights that are not there yet."""
    for variant in variants:
        folder = _folder(work, variant)
        if folder.is_dir():
            continue
        print(f"{variant.name}: quantizing", flush=True)
        model = MODELS[variant.model]()
        noise = torch.randint(model.module.config.vocab_size, (1, SHORT))
        calibration = Calibration(({"input_ids": noise, "attention_mask": torch.ones_like(noise)},))
        for node in variant.transforms:
            transform = bound("transform", node, plugins)
            model = transform.apply(model, TransformContext(lambda *_: None, calibration))
        made = folder.with_suffix(".unfinished")
        save_folder(model, made)
        made.rename(folder)


def measured(work: Path, variant: Variant, plugins: Plugins) -> dict[str, Any]:
    """One block of one variant: median milliseconds of each step, and what the steps must read and compute."""
    folder = _folder(work, variant)
    backend: Backend = bound("backend", variant.backend, plugins)
    session = backend.open(folder, folder, LIMITS)
    assert isinstance(session, TokenSession)
    with session:
        _fill(session)
        times = [round(1e3 * _seconds(session, one), 4) for one in WORKS]
        return {"variant": variant.name, "demands": _demands(session, folder), "ms": times}


def _fill(session: TokenSession) -> None:
    """Let every block of the cache hold keys and values, each its own copy of a prompt's."""
    chunk = Work(1, CHUNK, CHUNK).plan(session.caps.block_size)
    session.execute(chunk)
    [row] = chunk.rows
    given = len(row.blocks)
    session.copy_blocks([(block % given, block) for block in range(given, session.caps.blocks)])


def _seconds(session: TokenSession, work: Work) -> float:
    """Of a step, the median. The first run warms up, but for chunks: they come last, and are long enough."""
    plan, found, least = work.plan(session.caps.block_size), list[float](), 1 if work.tokens == CHUNK else 3
    while sum(found) < SECONDS or len(found) < least:
        begin = time.perf_counter()
        session.execute(plan)
        found.append(time.perf_counter() - begin)
    return float(np.median(found[1:] or found))


def _demands(session: TokenSession, folder: Path) -> dict[str, float]:
    """What a step reads of weights, and of one position of the cache; and the operations of one token.

    As the kernels tell it themselves, for `optkit explain`: without the scales of groups.
    """
    kernels = session.profile(Work(1, 1, 2).plan(session.caps.block_size))
    config = json.loads((folder / "config.json").read_text())

    def operations(integer: bool, head: bool) -> int:
        return sum(
            kernel.operations
            for kernel in kernels
            if _integer(kernel) == integer and (kernel.layer == "lm_head") == head
        )

    return {
        "weight_bytes": sum(kernel.weight_bytes for kernel in kernels),
        "position_bytes": session.read_blocks([0]).nbytes / session.caps.block_size,
        "float": operations(integer=False, head=False),
        "integer": operations(integer=True, head=False),
        "float_head": operations(integer=False, head=True),
        "integer_head": operations(integer=True, head=True),
        # A query of each head by a key, and a share by a value.
        "float_position": 4 * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"],
    }


def _integer(kernel: KernelTime) -> bool:
    return "int8 input" in kernel.kernel


def least_ms(work: Work, demands: dict[str, float], peaks: hardware.Peaks) -> float:
    """The ceiling of a step: milliseconds that it takes if nothing but memory, or arithmetic, holds it up."""
    tokens = work.rows * work.tokens
    return 1e3 * peaks.least_seconds(
        demands["weight_bytes"] + work.rows * work.context * demands["position_bytes"],
        tokens * demands["float"] + work.rows * demands["float_head"] + work.seen * demands["float_position"],
        tokens * demands["integer"] + work.rows * demands["integer_head"],
    )


def ceilings(found: list[dict[str, Any]]) -> hardware.Peaks:
    """The best of several measurements."""
    best = {
        figure: max((each[figure] for each in found if each[figure]), default=None)
        for figure in ("read_gb_per_s", "copy_gb_per_s", "fp32_gflops", "bf16_gflops", "int8_gops")
    }
    return hardware.Peaks.model_validate(found[-1] | best)


def report(blocks: list[dict[str, Any]], peaks: hardware.Peaks) -> dict[str, Any]:
    """Medians of all steps with their intervals, the block being the unit, and their ceilings."""
    by_variant = defaultdict(list)
    for block in blocks:
        by_variant[block["variant"]].append(block)
    rows = []
    for variant in VARIANTS:
        found = by_variant[variant.name]
        for index, work in enumerate(WORKS if found else ()):
            ms = [block["ms"][index] for block in found]
            estimate = median_ratio(np.log(ms))
            rows.append(
                {"model": variant.model, "format": variant.format}
                | asdict(work)
                | {"ms": asdict(estimate), "blocks_ms": ms, "least_ms": least_ms(work, found[-1]["demands"], peaks)}
            )
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "ceilings": peaks.model_dump(),
        "variants": [asdict(variant) for variant in VARIANTS if by_variant[variant.name]],
        "demands": {name: found[-1]["demands"] for name, found in by_variant.items() if found},
        "steps": rows,
    }


def table(data: dict[str, Any]) -> str:
    """The figures as Markdown."""
    machine, peaks = data["machine"], data["ceilings"]
    fewest = min(len(row["blocks_ms"]) for row in data["steps"])
    lines = [
        "<!-- Written by benchmarks/cpu_lm/growth.py; run it again instead of editing. -->",
        "",
        "# How the cost of a step grows",
        "",
        f"The native kernels on {machine['cores']} cores of {machine['cpu']} ({', '.join(machine['isa'])}), which read",
        f"{peaks['read_gb_per_s']:.1f} GB/s and multiply {peaks['fp32_gflops']:.0f} GFLOP/s in float32 and"
        + (f" {peaks['int8_gops']:.0f} GOP/s in int8." if peaks["int8_gops"] else " no int8."),
        f"Medians of {fewest} blocks or more, with 95% intervals. The least: weights, keys and values read once, or",
        "all products, whichever takes longer; the share is that of the least in what was found.",
        "",
        "![plots of these figures](growth.svg)",
    ]
    for title, works, told in (
        ("Concurrency: one more token of each sequence, after 128", CONCURRENT, "sequences"),
        ("Context: one more token of each sequence", DEEP, "sequences of tokens"),
        (f"Prompts: the last {CHUNK} tokens", CHUNKS, "of tokens"),
    ):
        lines += ["", f"## {title}", "", f"| model | {told} | ms | tokens/s | least ms | share |"]
        lines.append("|---|---:|---:|---:|---:|---:|")
        for row in data["steps"]:
            work, ms = Work(row["rows"], row["tokens"], row["context"]), Estimate(**row["ms"])
            if work in works:
                size = {CONCURRENT: f"{work.rows}", DEEP: f"{work.rows} of {work.context}", CHUNKS: f"{work.context}"}
                speed = 1e3 * work.rows * work.tokens / ms.value
                lines.append(
                    f"| {row['model']}, {row['format']} | {size[works]} | {_ms(ms)} | {_digits(speed)} "
                    f"| {_digits(row['least_ms'])} | {row['least_ms'] / ms.value:.0%} |"
                )
    return "\n".join(lines) + "\n"


def _ms(ms: Estimate) -> str:
    return f"{_digits(ms.value)} [{_digits(ms.low)}, {_digits(ms.high)}]"


def _digits(number: float) -> str:
    """Three of them."""
    return f"{number:.{max(0, 2 - int(np.floor(np.log10(number))))}f}"


def _folder(work: Path, variant: Variant) -> Path:
    return work / re.sub(r"[^\w.-]+", "-", variant.name)


def _add(file: Path, found: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(found) + "\n")


def _all(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for models and blocks")
    parser.add_argument("--prepare", action="store_true", help="make what is timed, and time nothing")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--only", default="", help="variants whose names match this regular expression")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    asked = parser.parse_args()
    work: Path = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    variants = [variant for variant in VARIANTS if re.search(asked.only, variant.name)]
    plugins = Plugins.load()
    prepare(work, variants, plugins)
    if asked.prepare:
        return
    blocks, peaks = work / "blocks.jsonl", work / "ceilings.jsonl"
    if asked.blocks:
        _add(peaks, hardware.measure(lambda *_: None).model_dump())
    for _ in range(asked.blocks):
        for variant in random.sample(variants, len(variants)):
            block = measured(work, variant, plugins)
            _add(blocks, block)
            print(f"{variant.name}: {' '.join(map(_digits, block['ms']))} ms", flush=True)
    data = report(_all(blocks), ceilings(_all(peaks)))
    asked.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    asked.output.with_suffix(".md").write_text(table(data), encoding="utf-8")
    growth_picture.draw(data, asked.output.with_suffix(".svg"))
    print(table(data))


if __name__ == "__main__":
    main()
