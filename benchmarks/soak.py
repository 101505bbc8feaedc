"""Serves a mixed load for a while, and writes how memory went into `benchmarks/soak.json`.

Usage: python benchmarks/soak.py [ARTIFACT] [SECONDS] [TARGET]

Sixteen clients at once: streams that are read to their end, streams that are left in the middle, whole answers,
structured output, several prompts, requests that are wrong, batches, and a look at the metrics. The slope of resident
memory is a least-squares line through the second half. At the end all blocks of the KV cache must be free.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from load import derived, metrics, resident, server

from optkit import hardware

CLIENTS, SEQUENCES, LENGTH = 16, 8, 256
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "models",
    "read",
    "tokens",
    "and",
    "answer",
    "with",
    "the",
    "next",
    "one",
]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


class Load:
    """What the clients do, and what came of it."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url, self._client = url, client
        self._draw = random.Random(0)

    async def one(self) -> None:
        """One request of any kind."""
        kinds = [self.whole, self.stream, self.leave, self.structured, self.several, self.wrong, self.look, self.batch]
        kind = self._draw.choices(kinds, (6, 6, 3, 2, 2, 1, 1, 0.2))[0]
        self.outcomes[f"{kind.__name__} {await kind()}"] += 1

    def _body(self, **more: Any) -> dict[str, Any]:
        text = " ".join(self._draw.choices(WORDS, k=self._draw.randint(2, 40)))
        return {"messages": [{"role": "user", "content": text}], "max_tokens": self._draw.randint(1, 32), **more}

    async def _post(self, path: str, body: dict[str, Any]) -> int:
        return (await self._client.post(self._url + path, json=body)).status_code

    async def whole(self) -> int:
        return await self._post("/v1/chat/completions", self._body(temperature=0.7))

    async def stream(self, leave: float = 0.0) -> str:
        async with self._client.stream(
            "POST", f"{self._url}/v1/chat/completions", json=self._body(stream=True)
        ) as answer:
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
                if self._draw.random() < leave:
                    return "left"
            return "whole" if last == "data: [DONE]" else f"{answer.status_code}"

    async def leave(self) -> str:
        return await self.stream(0.3)

    async def structured(self) -> int:
        shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
        return await self._post("/v1/chat/completions", self._body(response_format=shape))

    async def several(self) -> int:
        prompts = [" ".join(self._draw.choices(WORDS, k=8)) for _ in range(3)]
        return await self._post("/v1/completions", {"prompt": prompts, "max_tokens": 8, "logprobs": 2, "echo": True})

    async def wrong(self) -> int:
        body = self._draw.choice(
            [{"messages": []}, self._body(n=0), self._body(model="nobody"), self._body(max_tokens=10**6)]
        )
        return await self._post("/v1/chat/completions", body)

    async def look(self) -> int:
        return (await self._client.get(f"{self._url}/metrics")).status_code

    async def batch(self) -> str:
        url = "/v1/chat/completions"
        lines = [{"custom_id": str(n), "method": "POST", "url": url, "body": self._body()} for n in range(4)]
        content = "\n".join(map(json.dumps, lines)).encode()
        form = {"data": {"purpose": "batch"}, "files": {"file": ("in.jsonl", content)}}
        file = (await self._client.post(f"{self._url}/v1/files", **form)).json()
        wish = {"input_file_id": file["id"], "endpoint": url, "completion_window": "24h"}
        batch = (await self._client.post(f"{self._url}/v1/batches", json=wish)).json()
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.5)
            batch = (await self._client.get(f"{self._url}/v1/batches/{batch['id']}")).json()
        for name in (batch["input_file_id"], batch["output_file_id"]):
            await self._client.delete(f"{self._url}/v1/files/{name}")
        return f"{batch['status']} {batch['request_counts']['completed']}"


async def run(url: str, seconds: float, pid: int) -> tuple[Load, list[dict[str, float]]]:
    """All clients, and memory meanwhile."""
    memory: list[dict[str, float]] = []
    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=2 * CLIENTS)) as client:
        load = Load(url, client)

        async def go_on() -> None:
            while time.perf_counter() - began < seconds:
                await load.one()

        async def watch() -> None:
            while True:
                sample = {"seconds": time.perf_counter() - began, "requests": load.outcomes.total()} | resident(pid)
                memory.append(sample)
                if len(memory) % 6 == 1:
                    print({name: round(value) for name, value in sample.items()}, flush=True)
                await asyncio.sleep(max(1.0, seconds / 360))

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(go_on() for _ in range(CLIENTS)))
        watching.cancel()
    return load, memory


def slope(memory: list[dict[str, float]], name: str) -> float:
    """MiB an hour."""
    hours = [one["seconds"] / 3600 for one in memory]
    return float(np.polyfit(hours, [one[name] for one in memory], 1)[0])


def main() -> None:
    """Load, measure and write."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/quickstart")
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 1800.0
    target = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(__file__).with_suffix(".json")
    with tempfile.TemporaryDirectory() as folder:
        artifact = derived(path, Path(folder) / "artifact", sequences=SEQUENCES, length=LENGTH)
        with server(artifact, "--state", str(Path(folder) / "state")) as (url, process):
            load, memory = asyncio.run(run(url, seconds, process.pid))
            while any((left := metrics(url)).values()):
                time.sleep(0.1)
    half = [one for one in memory if one["seconds"] >= memory[-1]["seconds"] / 2]
    requests = half[-1]["requests"] - half[0]["requests"]
    data: dict[str, Any] = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "workload": {"clients": CLIENTS, "sequences": SEQUENCES, "seconds": seconds},
        "outcomes": dict(sorted(load.outcomes.items())),
        "requests": load.outcomes.total(),
        "requests_in_second_half": requests,
        "slope_in_second_half_mib_per_hour": {name: slope(half, name) for name in ("server", "worker")},
        "slope_in_second_half_mib_per_hour_per_1000_requests": {
            name: slope(half, name) / (requests / 1000) for name in ("server", "worker")
        },
        "growth_in_second_half_mib_per_1000_requests": {
            name: slope(half, name) * (half[-1]["seconds"] - half[0]["seconds"]) / 3600 / (requests / 1000)
            for name in ("server", "worker")
        },
        "left_at_the_end": left,
        "memory_mib": memory,
    }
    print(json.dumps({name: value for name, value in data.items() if name not in ("machine", "memory_mib")}, indent=1))
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
