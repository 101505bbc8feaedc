"""Measures continuous against static batching on one artifact, and writes `benchmarks/continuous.json`.

Usage: python benchmarks/continuous.py [ARTIFACT] [BLOCKS]

64 requests at once, prompts of 32 to 256 tokens and outputs of 32 to 128, most of them short. Every strategy runs in
the same open session with the same number of sequences, in random order within each block. Throughput is output tokens
per second from the first request to the last token.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from optkit import hardware
from optkit.artifact import open_artifact
from optkit.batching import Batcher
from optkit.bench.statistics import median_ratio
from optkit.builtin.texts import PythonReference
from optkit.engine import Engine, Request, SamplingParams
from optkit.engine.text import load_tokenizer
from optkit.opening import Files, files_of, open_files, token_session
from optkit.plugins import Plugins
from optkit.steps import Limits
from optkit_batching.continuous import Continuous
from optkit_batching.static import Static

REQUESTS, SEQUENCES, LENGTH = 64, 16, 512
ARMS: dict[str, Batcher] = {
    "static": Static(max_batch_size=SEQUENCES),
    "static, not padded": Static(max_batch_size=SEQUENCES, padded=False),
    "continuous": Continuous(max_batch_size=SEQUENCES),
}


def workload(artifact_weights: Path) -> list[Request]:
    """Prompts cut from real text, log-uniform in length; outputs from a beta distribution with its mass at 32."""
    tokenizer = load_tokenizer(artifact_weights)
    tokens = tokenizer("\n\n".join(PythonReference().texts())[:200_000]).input_ids
    draw, requests, start = random.Random(0), [], 0
    for _ in range(REQUESTS):
        length = round(32 * 8 ** draw.random())
        output = 32 + round(96 * draw.betavariate(0.4, 1.2))
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        requests.append(Request(tuple(tokens[start : start + length]), params))
        start += length
    return requests


def main() -> None:
    """Measure and write."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/quickstart")
    blocks = int(sys.argv[2]) if len(sys.argv) > 2 else 6
    plugins = Plugins.load(third_party=False)
    artifact = open_artifact(path)
    files = files_of(artifact)
    limits = Limits(SEQUENCES, LENGTH)
    opened, _ = open_files(artifact.manifest.recipe, Files(files.runtime, files.weights, limits), plugins)
    requests, order = workload(artifact.weights), random.Random(1)
    samples: list[dict[str, object]] = []
    with token_session(opened, artifact) as session:
        warm = Engine(session, ARMS["continuous"])
        for request in requests[:SEQUENCES]:
            warm.add(Request(request.prompt, SamplingParams(max_tokens=4, ignore_eos=True)))
        while warm.busy:
            warm.step()
        for block in range(blocks):
            for name in order.sample(list(ARMS), len(ARMS)):
                engine, begin, tokens = Engine(session, ARMS[name]), time.perf_counter(), 0
                for request in requests:
                    engine.add(request)
                while engine.busy:
                    tokens += sum(event.token is not None for event in engine.step())
                seconds = time.perf_counter() - begin
                assert tokens == sum(request.params.max_tokens for request in requests)
                samples.append({"block": block, "arm": name, "seconds": seconds, "steps": engine.stats.steps})
                print(f"block {block}  {name:20} {tokens / seconds:7.1f} tok/s  {engine.stats.steps} steps", flush=True)
    report(artifact.manifest.recipe, requests, samples, blocks)


def report(recipe: dict[str, object], requests: list[Request], samples: list[dict[str, object]], blocks: int) -> None:
    """Put ratios and workload into the file, and the ratios on the screen."""
    seconds = {name: np.array([s["seconds"] for s in samples if s["arm"] == name], np.float64) for name in ARMS}
    outputs = np.array([request.params.max_tokens for request in requests], np.float64)
    prompts = np.array([len(request.prompt) for request in requests], np.float64)
    ratios = {}
    for name in ARMS:
        if name != "continuous":
            ratios[name] = asdict(median_ratio(np.log(seconds[name] / seconds["continuous"])))
            print(
                f"continuous over {name}: {ratios[name]['value']:.2f}x "
                f"[{ratios[name]['low']:.2f}, {ratios[name]['high']:.2f}]"
            )
    data = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "recipe": recipe,
        "workload": {
            "requests": len(requests),
            "prompt_tokens": _summary(prompts),
            "output_tokens": _summary(outputs),
            "output_skewness": float(((outputs - outputs.mean()) ** 3).mean() / outputs.std() ** 3),
        },
        "arms": {name: {type(batcher).__name__.lower(): batcher.model_dump()} for name, batcher in ARMS.items()},
        "blocks": blocks,
        "throughput_tokens_per_second": {name: float(np.median(outputs.sum() / seconds[name])) for name in ARMS},
        "continuous_over": ratios,
        "samples": samples,
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


def _summary(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return {"total": float(values.sum()), "mean": float(values.mean())} | dict(
        zip(("min", "p25", "median", "p75", "max"), map(float, quantiles), strict=True)
    )


if __name__ == "__main__":
    main()
