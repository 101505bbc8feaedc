"""An artifact of optkit, its steps planned by its own recipe.

Usage: python ours.py WORKLOAD ARTIFACT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from turns import Floats, Generator, Request, take_turns

import optkit.engine
from optkit.artifact import open_artifact
from optkit.engine import Engine, SamplingParams
from optkit.evaluate import SessionScorer
from optkit.opening import files_of, open_files, token_session
from optkit.plugins import Plugins


class Ours(Generator):
    """The engine that serves and measures, in this process."""

    def __init__(self, path: Path) -> None:
        artifact = open_artifact(path)
        self.recipe: dict[str, Any] = artifact.manifest.recipe
        opened, self._batcher = open_files(self.recipe, files_of(artifact), Plugins.load())
        self._session = token_session(opened, artifact)

    def single(self, request: Request) -> tuple[float, list[list[int]]]:
        engine = Engine(self._session, self._batcher)
        outputs = _added(engine, [request])
        while not outputs[0]:
            _step(engine, outputs)
        begin = time.perf_counter()
        while engine.busy:
            _step(engine, outputs)
        return time.perf_counter() - begin, outputs

    def batch(self, requests: list[Request]) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        engine = Engine(self._session, self._batcher)
        outputs = _added(engine, requests)
        while engine.busy:
            _step(engine, outputs)
        return time.perf_counter() - begin, outputs

    def logits(self, tokens: list[int]) -> Floats:
        return SessionScorer(self._session).logits(tuple(tokens))


def _added(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """Where the tokens of requests will be, which an engine numbers from 0."""
    for request in requests:
        params = SamplingParams(max_tokens=request.output, ignore_eos=True)
        engine.add(optkit.engine.Request(tuple(request.prompt), params))
    return [[] for _ in requests]


def _step(engine: Engine, outputs: list[list[int]]) -> None:
    for event in engine.step():
        assert event.token is not None, event.error
        outputs[event.request].append(event.token)


def main() -> None:
    ours = Ours(Path(sys.argv[2]))
    take_turns(ours, {"recipe": {key: ours.recipe[key] for key in ("transforms", "backend", "batching")}})


if __name__ == "__main__":
    main()
