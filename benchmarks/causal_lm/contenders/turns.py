"""What the contenders share: they generate when they are told to, in a process each. Needs numpy alone.

Usage of every contender: python CONTENDER.py WORKLOAD ARGUMENTS...

WORKLOAD is JSON: `single`, a request, and `requests`, a list of them, each with `prompt`, its token ids, and `output`,
how many tokens it asks for. A contender loads its model, warms up, and prints a line of JSON about itself. Then it
reads lines, and answers each with JSON: `single` generates for the one request and times what comes after the first
token; `batch` generates for all of them and times the whole; `logits IN OUT` writes `[tokens, vocabulary]` float32 for
a JSON list of token ids. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Generator", "Request", "take_turns", "workload"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """What is to be generated, by greedy decoding and past any end token."""

    prompt: list[int]
    output: int


class Generator(ABC):
    """A contender. Seconds are of the clock on the wall; outputs are token ids, one list a request."""

    @abstractmethod
    def single(self, request: Request) -> tuple[float, list[list[int]]]:
        """Seconds from the first token to the last, and the tokens."""

    @abstractmethod
    def batch(self, requests: list[Request]) -> tuple[float, list[list[int]]]:
        """Seconds from the start to the last token of all, and the tokens that were asked for."""

    @abstractmethod
    def logits(self, tokens: list[int]) -> Floats:
        """`[tokens, vocabulary]`; position t predicts token t + 1."""


def workload() -> tuple[Request, list[Request]]:
    """The single request, and those of the batch."""
    found = json.loads(Path(sys.argv[1]).read_text())
    return Request(**found["single"]), [Request(**each) for each in found["requests"]]


def take_turns(generator: Generator, about: dict[str, Any]) -> None:
    """Answer the lines on stdin, until they end.

    Args:
        generator: the model, open.
        about: the contender's versions and settings.
    """
    # Libraries greet on stdout; the answers keep it for themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    single, requests = workload()
    generator.single(Request(single.prompt, 4))
    generator.batch([Request(request.prompt[:8], 2) for request in requests])
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        command, *files = line.split()
        if command == "logits":
            source, target = files
            np.save(target, generator.logits(json.loads(Path(source).read_text())))
            print(json.dumps({"saved": target}), file=answers)
            continue
        seconds, outputs = generator.single(single) if command == "single" else generator.batch(requests)
        print(json.dumps({"seconds": seconds, "outputs": outputs}), file=answers)
