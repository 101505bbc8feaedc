"""An artifact of optkit, its steps planned by its own recipe.

Usage: python ours.py WORKLOADS ARTIFACT
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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

    def generate(self, requests: list[Request]) -> Iterator[list[tuple[int, int]]]:
        engine = Engine(self._session, self._batcher)
        for request in requests:
            params = SamplingParams(max_tokens=request.output, ignore_eos=True)
            engine.add(optkit.engine.Request(tuple(request.prompt), params))
        while engine.busy:
            came = []
            for event in engine.step():
                assert event.token is not None, event.error
                came.append((event.request, event.token))
            if came:
                yield came

    def logits(self, tokens: list[int]) -> Floats:
        return SessionScorer(self._session).logits(tuple(tokens))


def main() -> None:
    ours = Ours(Path(sys.argv[2]))
    take_turns(ours, {"recipe": {key: ours.recipe[key] for key in ("transforms", "backend", "batching")}})


if __name__ == "__main__":
    main()
