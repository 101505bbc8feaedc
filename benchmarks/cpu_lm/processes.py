"""The contenders' processes and environments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import venv
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

__all__ = ["SCRIPTS", "Contender", "Told", "environment"]

SCRIPTS = Path(__file__).with_name("contenders")


class Contender:
    """A process that generates when it is told to, and is stopped until then: some engines go on for a second when they
    have nothing to do, on a core that is another's by then."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # In a group with those that it starts. When this process ends, the system ends groups that are stopped.
        self._process = subprocess.Popen(command, cwd=SCRIPTS, text=True, process_group=0, **pipes)
        self.about = self._answer()
        self._signal(signal.SIGSTOP)

    def tell(self, line: str) -> dict[str, Any]:
        """Its answer to one of the commands in `contenders/turns.py`."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()


class Told:
    """A contender as what `optkit.evaluate` asks for logits."""

    def __init__(self, contender: Contender, folder: Path) -> None:
        self._contender, self._folder = contender, folder

    def logits(self, window: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
        asked, answer = self._folder / "window.json", self._folder / "window.npy"
        asked.write_text(json.dumps(window))
        self._contender.tell(f"logits {asked} {answer}")
        return np.load(answer)


@cache
def environment(place: Path, requirements: Path) -> str:
    """The Python of an environment, made when it is missing."""
    python, done = place / "bin/python", place / "installed"
    if not done.is_file():
        venv.create(place, clear=True, symlinks=True, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        done.touch()
    return str(python)
