"""Measures what the engine costs per step beside the model, on a session that computes nothing.

Usage: python benchmarks/scheduler.py [STEPS]

Writes `benchmarks/scheduler.json`. A step's overhead is its whole time less the time inside `execute`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from optkit import hardware
from optkit.backends import TokenSession
from optkit.bench.statistics import percentile_interval
from optkit.engine import Engine, Request, SamplingParams
from optkit.steps import Caps, KernelTime, StepPlan, StepResult
from optkit_batching.continuous import Continuous

CASES = ((64, 0), (64, 1_000), (256, 1_000), (1_000, 10_000))
"""Running sequences and waiting requests."""
VOCABULARY = 32


class EmptySession(TokenSession):
    """Gives the same logits to every row, and counts the time that it takes for that."""

    def __init__(self, rows: int) -> None:
        self.caps = Caps("paged", 16, rows * 40, rows, True, VOCABULARY, 640)
        self.seconds = 0.0
        self._logits = np.random.default_rng(0).normal(size=(1, VOCABULARY)).astype(np.float32)

    def execute(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        empty = self._logits[:0]
        result = StepResult(tuple(empty if row.logits == "none" else self._logits for row in plan.rows))
        self.seconds += time.perf_counter() - begin
        return result

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.generic]:
        return np.zeros((len(blocks), 1))

    def write_blocks(self, blocks: Sequence[int], contents: npt.NDArray[np.generic]) -> None:
        """Nothing is kept."""

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        return []

    def close(self) -> None:
        """Nothing to close."""


def overheads(running: int, waiting: int, steps: int) -> list[float]:
    """Seconds of each of `steps` steps with `running` sequences and `waiting` requests behind them."""
    draw = random.Random(0)
    session = EmptySession(running)
    engine = Engine(session, Continuous(max_batch_size=running, max_step_tokens=8 * running + 512))

    def add() -> None:
        prompt = tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(32, 256)))
        engine.add(Request(prompt, SamplingParams(max_tokens=draw.randint(32, 256), ignore_eos=True)))

    for _ in range(running + waiting):
        add()
    while engine.stats.running < running:
        engine.step()
    for _ in range(20):
        engine.step()
    found = []
    while len(found) < steps:
        # Requests end on their way, and others come: both are part of the steps that are timed, arrivals are not.
        while engine.stats.waiting < waiting:
            add()
        session.seconds, begin = 0.0, time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - begin - session.seconds)
    return found


def main() -> None:
    """Measure and write."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    figures = []
    for running, waiting in CASES:
        times = np.array(overheads(running, waiting, steps)) * 1e3
        random = np.random.default_rng(0)
        medians = np.median(times[random.integers(len(times), size=(2_000, len(times)))], axis=1)
        low, high = percentile_interval(medians)
        median, p99 = float(np.median(times)), float(np.quantile(times, 0.99))
        figures.append(
            {"running": running, "waiting": waiting, "median_ms": median, "interval_ms": [low, high], "p99_ms": p99}
        )
        print(f"{running:5} running {waiting:6} waiting  {median:6.2f} ms [{low:.2f}, {high:.2f}]  p99 {p99:.2f} ms")
    data = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(hardware.machine()),
        "steps": steps,
        "overhead": figures,
    }
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
