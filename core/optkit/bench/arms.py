"""The two ways to run a causal language model that every benchmark sets side by side: transformers' own, and ours."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from optkit import hardware
from optkit.backends import EngineSession, TokenSession
from optkit.batching import Batcher
from optkit.bench.interleave import GenerationArm
from optkit.engine import Engine, Event, Request, SamplingParams
from optkit.engine.streaming import StreamingEngine
from optkit.errors import MachineError
from optkit.metrics import Run
from optkit.model import Model

__all__ = ["EngineArm", "SessionArm", "TransformersArm", "all_cores"]


class TransformersArm(GenerationArm):
    """`generate` of transformers, greedy and with its KV cache: what a user has before optimizing anything."""

    def __init__(self, model: Model, name: str) -> None:
        self.name = name
        self.module: Any = model.module

    def run(self, prompt: tuple[int, ...], output_tokens: int) -> Run:
        import torch
        from transformers import GenerationConfig

        module = self.module
        # In the place of the model's own configuration, whose penalties and stop tokens would make the work unequal.
        settings = GenerationConfig(max_new_tokens=output_tokens, do_sample=False, pad_token_id=0, use_cache=True)
        own, module.generation_config = module.generation_config, settings
        try:
            with all_cores(), torch.inference_mode():
                watch = _Stopwatch()
                ids = torch.tensor([prompt])
                module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=watch)
        finally:
            module.generation_config = own
        return watch.run(len(prompt))

    def close(self) -> None:
        self.module = None


class SessionArm(GenerationArm):
    """One request after the other through the engine, over an open session of a backend. Closes the session.

    Args:
        session: nothing else may run in it meanwhile.
        batcher: the strategy of the recipe.
    """

    def __init__(self, session: TokenSession, batcher: Batcher, name: str) -> None:
        self.name = name
        self.session = session
        self._batcher = batcher

    def run(self, prompt: tuple[int, ...], output_tokens: int) -> Run:
        return _timed(
            lambda request: Engine(self.session, self._batcher).stream(request), prompt, output_tokens, self.name
        )

    def close(self) -> None:
        self.session.close()


class EngineArm(GenerationArm):
    """One request after the other through a runtime that batches by itself, as serving drives it. Closes the session.

    Args:
        session: nothing else may run in it meanwhile.
    """

    def __init__(self, session: EngineSession, name: str) -> None:
        self.name = name
        self.session = session
        self._engine = StreamingEngine(session)

    def run(self, prompt: tuple[int, ...], output_tokens: int) -> Run:
        return _timed(self._engine.stream, prompt, output_tokens, self.name)

    def close(self) -> None:
        self._engine.close()
        self.session.close()


def _timed(stream: Callable[[Request], Iterator[Event]], prompt: tuple[int, ...], output_tokens: int, name: str) -> Run:
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    with all_cores():
        begin = time.perf_counter()
        seconds, output = [], []
        for event in stream(Request(prompt, params)):
            if event.token is None:
                raise MachineError(f"the model failed ({event.error or event.finished})", where=name)
            seconds.append(time.perf_counter() - begin)
            output.append(event.token)
    return Run(len(prompt), tuple(seconds), tuple(output))


class _Stopwatch:
    """A streamer of transformers that notes when each token came."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._prompt_seen = False
        self._seconds: list[float] = []
        self._output: list[int] = []

    def put(self, tokens: Any) -> None:
        """Called by `generate`, first with the prompt and then with each token."""
        if self._prompt_seen:
            self._seconds.append(time.perf_counter() - self._begin)
            self._output += tokens.tolist()
        self._prompt_seen = True

    def end(self) -> None:
        """Called by `generate` at the end."""

    def run(self, prompt_tokens: int) -> Run:
        return Run(prompt_tokens, tuple(self._seconds), tuple(self._output))


@contextmanager
def all_cores() -> Iterator[None]:
    """The same threads for every arm, whatever the process was started with."""
    # A runtime without torch in it is not made to load it: the import would count as the runtime's own memory.
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(hardware.usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
