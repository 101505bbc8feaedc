"""What the contenders share: they generate when they are told to, in a process each. Needs numpy alone.

Usage of every contender: python CONTENDER.py WORKLOADS MODEL [ARGUMENTS...]

WORKLOADS is JSON: lists of requests by name, each request with `prompt`, its token ids, and `output`, how many tokens
it asks for. A contender loads its model, warms up, and prints a line of JSON about itself. Then it reads lines, and
answers each with JSON: `run NAME` generates for all requests of a workload at once; `logits IN OUT` writes
`[tokens, vocabulary]` float32 for a JSON list of token ids. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "Generator", "Request", "take_turns"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """What is to be generated, by greedy decoding and past any end token."""

    prompt: list[int]
    output: int


class Generator(ABC):
    """A contender."""

    @abstractmethod
    def generate(self, requests: list[Request]) -> Iterator[list[tuple[int, int]]]:
        """Generates for all requests at once, and gives the tokens as they come: which request, and its next token.
        More tokens than a request asked for may come; they are not counted."""

    @abstractmethod
    def logits(self, tokens: list[int]) -> Floats:
        """`[tokens, vocabulary]`; position t predicts token t + 1."""


def timed(generator: Generator, requests: list[Request]) -> dict[str, Any]:
    """One run: seconds to the first token of all, seconds to the last, and the tokens that were asked for."""
    outputs: list[list[int]] = [[] for _ in requests]
    first, begin = 0.0, time.perf_counter()
    for came in generator.generate(requests):
        first = first or time.perf_counter() - begin
        for request, token in came:
            outputs[request].append(token)
    seconds = time.perf_counter() - begin
    asked = [row[: request.output] for row, request in zip(outputs, requests, strict=True)]
    assert [len(row) for row in asked] == [request.output for request in requests]
    return {"first": first, "seconds": seconds, "outputs": asked}


def take_turns(generator: Generator, about: dict[str, Any]) -> None:
    """Answer the lines on stdin, until they end.

    Args:
        generator: the model, open.
        about: the contender's versions and settings; `at_once`, if it runs no larger workloads.
    """
    # Libraries greet on stdout; the answers keep it for themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    found = json.loads(Path(sys.argv[1]).read_text())
    workloads = {name: [Request(**each) for each in requests] for name, requests in found.items()}
    for requests in workloads.values():
        if len(requests) > about.get("at_once", len(requests)):
            continue
        timed(generator, [Request(request.prompt[:8], 2) for request in requests])
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        command, rest = line.rstrip("\n").split(" ", 1)
        if command == "logits":
            source, target = rest.split()
            np.save(target, generator.logits(json.loads(Path(source).read_text())))
            print(json.dumps({"saved": target}), file=answers)
            continue
        print(json.dumps(timed(generator, workloads[rest])), file=answers)
