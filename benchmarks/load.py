"""What the benchmarks of the server share: an artifact with the limits they need, a server, and a lean client.

The client shares the machine with what it measures, so it parses as little as it can.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from optkit.artifact import open_artifact, publish, staging


def derived(artifact: Path, target: Path, *, sequences: int, length: int) -> Path:
    """The same files under continuous batching of `sequences` sequences of up to `length` tokens."""
    manifest = open_artifact(artifact).manifest
    facts = manifest.model_dump(exclude={"format", "digest", "files"})
    facts["recipe"] = {**manifest.recipe, "batching": {"continuous": {"max_batch_size": sequences}}}
    facts |= {"max_batch_size": sequences, "max_length": length}
    with staging(target) as staged:
        for part in ("weights", "runtime"):
            shutil.copytree(artifact / part, staged / part)
        return publish(staged, target, facts).path


@contextmanager
def server(artifact: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`optkit serve` on a free port: its URL and its process."""
    command = [sys.executable, "-m", "optkit.cli", "serve", f"model={artifact}", "--port", "0", *options]
    with (artifact.parent / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving "), line
            yield line.split()[-1], process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@dataclass(slots=True)
class Outcome:
    """Of one request."""

    status: int
    """0: the connection broke before there was one."""
    seconds: float
    """From sending to the end of the answer."""
    events: list[float] = field(default_factory=list)
    """When each part of a stream came, in seconds from sending."""
    body: bytes = b""
    """Of an answer that is no stream; of a stream its last part."""


async def post(url: str, path: str, body: dict[str, Any]) -> Outcome:
    """One request on a connection of its own."""
    place = urlsplit(url)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {place.netloc}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    began = time.perf_counter()
    status, events, last = 0, [], b""
    try:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data)
        first = await reader.readuntil(b"\r\n\r\n")
        status = int(first.split(b" ", 2)[1])
        while part := await reader.read(1 << 16):
            events.append(time.perf_counter() - began)
            last = last + part if status != 200 or len(last) < 4096 else part
        writer.close()
    except (OSError, asyncio.IncompleteReadError):
        pass
    return Outcome(status, time.perf_counter() - began, events, last)


def resident(pid: int) -> dict[str, float]:
    """Memory of the server and of its worker, in MiB."""
    process = psutil.Process(pid)
    workers = sum(child.memory_info().rss for child in process.children(recursive=True))
    return {"server": process.memory_info().rss / 2**20, "worker": workers / 2**20}


def metrics(url: str) -> dict[str, float]:
    """What is open, and how full the KV cache is."""
    names = ("optkit:num_requests_running", "optkit:num_requests_waiting", "optkit:kv_cache_usage_perc")
    text = httpx.get(f"{url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith(names)]
    return {line.partition("{")[0]: float(line.split()[-1]) for line in lines}
