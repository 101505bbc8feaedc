"""Measures what the server costs beside its engine, and writes `benchmarks/serving.json`.

Usage: python benchmarks/serving.py [ARTIFACT] [BLOCKS]

16 streams at once, each 64 prompt and 96 output tokens, by turns, in random order within each block: through the
in-process engine (`AsyncLLM`), and through `optkit serve` over HTTP with server-sent events, its engine in a process of
its own. Throughput is output tokens per second from the first request to the last token. The HTTP client shares the two
cores with the server, as it would not in a deployment.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from load import derived, post, server

from optkit import AsyncLLM, SamplingParams, hardware
from optkit.artifact import open_artifact
from optkit.bench.statistics import median_ratio
from optkit.builtin.texts import PythonReference
from optkit.engine.text import load_tokenizer

STREAMS, PROMPT, OUTPUT, LENGTH = 16, 64, 96, 256
PARAMS = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)


def prompts(weights: Path) -> list[list[int]]:
    """Token ids cut from real text."""
    tokens = load_tokenizer(weights)("\n\n".join(PythonReference().texts())[:20_000]).input_ids
    return [tokens[start : start + PROMPT] for start in range(0, STREAMS * PROMPT, PROMPT)]


async def in_process(llm: AsyncLLM, work: list[list[int]]) -> list[list[float]]:
    """When each stream's tokens came."""
    began = time.perf_counter()

    async def one(prompt: list[int]) -> list[float]:
        times: list[float] = []
        async for delta in llm.stream(prompt, PARAMS):
            times += [time.perf_counter() - began] * len(delta.tokens)
        return times

    return await asyncio.gather(*map(one, work))


async def over_http(url: str, work: list[list[int]]) -> list[list[float]]:
    """When each stream's parts came."""

    async def one(prompt: list[int]) -> list[float]:
        body = {"prompt": prompt, "max_tokens": OUTPUT, "ignore_eos": True, "stream": True, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        outcome = await post(url, "/v1/completions", body)
        assert outcome.status == 200, outcome
        assert f'"completion_tokens":{OUTPUT}'.encode() in outcome.body, outcome.body
        return outcome.events

    return await asyncio.gather(*map(one, work))


async def measure(url: str, artifact: Path, blocks: int) -> list[dict[str, float | str]]:
    """All blocks."""
    work, order = prompts(artifact / "weights"), random.Random(1)
    samples: list[dict[str, float | str]] = []
    async with AsyncLLM(artifact) as llm:
        arms = {"in process": lambda: in_process(llm, work), "server": lambda: over_http(url, work)}
        for arm in arms.values():
            await arm()
        for block in range(blocks):
            # The second "in process" arm is the noise floor.
            for name in order.sample(["in process", "server", "in process again"], 3):
                began = time.perf_counter()
                times = await arms[name.removesuffix(" again")]()
                seconds = time.perf_counter() - began
                first = float(np.median([each[0] for each in times]))
                samples.append({"block": block, "arm": name, "seconds": seconds, "first_token": first})
                print(f"block {block}  {name:18} {STREAMS * OUTPUT / seconds:7.1f} tok/s", flush=True)
    return samples


def main() -> None:
    """Measure and write."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/quickstart")
    blocks = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    with tempfile.TemporaryDirectory() as folder:
        artifact = derived(path, Path(folder) / "artifact", sequences=STREAMS, length=LENGTH)
        with server(artifact) as (url, _):
            samples = asyncio.run(measure(url, artifact, blocks))
    seconds = {
        name: np.array([one["seconds"] for one in samples if one["arm"] == name], np.float64)
        for name in ("in process", "server", "in process again")
    }
    ratios = {
        name: asdict(median_ratio(np.log(seconds["in process"] / seconds[name])))
        for name in seconds
        if name != "in process"
    }
    for name, ratio in ratios.items():
        print(f"{name} over in process: {ratio['value']:.3f}x [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    data = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "recipe": open_artifact(path).manifest.recipe,
        "workload": {"streams": STREAMS, "prompt_tokens": PROMPT, "output_tokens": OUTPUT},
        "blocks": blocks,
        "throughput_tokens_per_second": {
            name: float(np.median(STREAMS * OUTPUT / values)) for name, values in seconds.items()
        },
        "over_in_process": ratios,
        "samples": samples,
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
