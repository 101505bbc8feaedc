"""Offers four times the load that a server can carry, and writes `benchmarks/overload.json`.

Usage: python benchmarks/overload.py [ARTIFACT] [REQUESTS]

The rate that the server carries is measured first, with as many requests open as it takes. Then requests arrive at four
times that rate, whatever becomes of those before them, each on a connection of its own. Every one must end, with an
answer or a refusal; how long a refusal takes, and the memory of server and worker, are what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from load import Outcome, derived, metrics, post, resident, server

from optkit import hardware
from optkit.artifact import open_artifact

SEQUENCES, QUEUE, LENGTH, OUTPUT = 8, 24, 128, 8
BODY = {"prompt": "The capital of France is", "max_tokens": OUTPUT, "ignore_eos": True, "temperature": 0}
PATH = "/v1/completions"


async def capacity(url: str, requests: int) -> float:
    """Requests per second with as many open as the server takes."""
    left = iter(range(requests))

    async def client() -> None:
        for _ in left:
            assert (await post(url, PATH, BODY)).status == 200

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(SEQUENCES + QUEUE)))
    return requests / (time.perf_counter() - began)


async def offered(url: str, rate: float, requests: int, memory: list[dict[str, float]], pid: int) -> list[Outcome]:
    """What becomes of requests that arrive at that rate."""
    began, tasks = time.perf_counter(), []
    for number in range(requests):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(post(url, PATH, BODY)))
        if number % 100 == 0:
            memory.append({"seconds": time.perf_counter() - began, "requests": number} | resident(pid))
        if number % 1000 == 0:
            print(f"{number} of {requests} sent, {memory[-1]}", flush=True)
    return await asyncio.gather(*tasks)


def summary(values: list[float]) -> dict[str, float]:
    """Quantiles, in milliseconds."""
    quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: float(np.quantile(values, share) * 1e3) for name, share in quantiles.items()}


def main() -> None:
    """Measure and write."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/quickstart")
    requests = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    memory: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        artifact = derived(path, Path(folder) / "artifact", sequences=SEQUENCES, length=LENGTH)
        with server(artifact, "--max-queue", str(QUEUE)) as (url, process):
            asyncio.run(capacity(url, 100))
            carried = asyncio.run(capacity(url, 300))
            print(f"carries {carried:.1f} requests/s", flush=True)
            outcomes = asyncio.run(offered(url, 4 * carried, requests, memory, process.pid))
            left = metrics(url)
            memory.append({"requests": requests} | resident(process.pid))
    statuses = Counter(outcome.status for outcome in outcomes)
    refused = [outcome.seconds for outcome in outcomes if outcome.status == 429]
    half = [one for one in memory if one["requests"] >= requests / 2]
    data: dict[str, Any] = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "recipe": open_artifact(path).manifest.recipe,
        "workload": {"requests": requests, "sequences": SEQUENCES, "queue": QUEUE, "output_tokens": OUTPUT},
        "carried_requests_per_second": carried,
        "offered_requests_per_second": 4 * carried,
        "outcomes_by_status": {str(status): count for status, count in sorted(statuses.items())},
        "refusal_milliseconds": summary(refused),
        "answer_milliseconds": summary([outcome.seconds for outcome in outcomes if outcome.status == 200]),
        "left_at_the_end": left,
        "memory_growth_in_second_half_mib": {name: half[-1][name] - half[0][name] for name in ("server", "worker")},
        "memory_mib": memory,
    }
    print(
        json.dumps(
            {name: value for name, value in data.items() if name not in ("machine", "memory_mib", "recipe")}, indent=1
        )
    )
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
