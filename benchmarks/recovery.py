"""Kills the worker of a server under load, and writes how long clients wait into `benchmarks/recovery.json`.

Usage: python benchmarks/recovery.py [ARTIFACT] [TIMES]

Eight streams decode when SIGKILL comes. Measured are the seconds until each of them has its error, and until `/ready`
says that requests are served again. A stream that ends without an error, or with a finish reason, is a false answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from load import derived, post, server

from optkit import hardware

STREAMS, LENGTH = 8, 512
BODY = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0, "stream": True}


async def once(url: str, pid: int) -> dict[str, Any]:
    """One death."""
    streams = [asyncio.create_task(post(url, "/v1/completions", BODY)) for _ in range(STREAMS)]
    async with httpx.AsyncClient() as client:
        while _running((await client.get(f"{url}/metrics")).text) < STREAMS:
            await asyncio.sleep(0.05)
        [worker] = [child for child in psutil.Process(pid).children() if "optkit.engine.worker" in child.cmdline()]
        os.kill(worker.pid, signal.SIGKILL)
        killed = time.perf_counter()
        ends: list[float] = []
        for stream in streams:
            stream.add_done_callback(lambda _: ends.append(time.perf_counter() - killed))
        outcomes = await asyncio.gather(*streams)
        while (await client.get(f"{url}/ready")).status_code != 200:
            await asyncio.sleep(0.02)
        ready = time.perf_counter() - killed
    false = sum(b'"worker_died"' not in one.body or b'"finish_reason":"stop"' in one.body for one in outcomes)
    return {"last_error_seconds": max(ends), "ready_seconds": ready, "false_answers": false}


def _running(text: str) -> float:
    lines = [line for line in text.splitlines() if line.startswith("optkit:num_requests_running")]
    return sum(float(line.split()[-1]) for line in lines)


def main() -> None:
    """Measure and write."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/quickstart")
    times = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        artifact = derived(path, Path(folder) / "artifact", sequences=STREAMS, length=LENGTH)
        with server(artifact) as (url, process):
            for _ in range(times):
                samples.append(asyncio.run(once(url, process.pid)))
                print(samples[-1], flush=True)
    data = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "workload": {"streams": STREAMS, "deaths": times},
        "worst": {name: max(sample[name] for sample in samples) for name in samples[0]},
        "samples": samples,
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
