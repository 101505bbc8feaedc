"""A compiled decoder in OpenVINO GenAI's continuous batching, as an engine of its own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
import openvino_genai

from optkit.backends import EngineCaps, EngineRequest, EngineSession
from optkit.errors import DamagedError, MachineError, RecipeError
from optkit.steps import Limits
from optkit_backends.openvino_genai.files import GRAPH, DecoderFacts
from optkit_backends.room import blocks_that_fit

__all__ = ["OpenVINOGenAISession"]

SAMPLING = frozenset({"temperature", "top_k", "top_p", "repetition_penalty", "seed"})
BLOCK_SIZE = 32
"""Tokens in one block of its KV cache on the CPU."""


@dataclass(eq=False, slots=True)
class _Stream:
    """A request, from the reader's side and from the engine's."""

    request: EngineRequest
    loop: AbstractEventLoop
    news: asyncio.Queue[list[int] | Exception | None] = field(default_factory=asyncio.Queue)
    handle: Any = None
    left: bool = False
    """Whether nobody reads any more."""

    def put(self, news: list[int] | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody reads there any more
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)


class OpenVINOGenAISession(EngineSession):
    """Runs what `compile_decoder` wrote; see `optkit.backends.EngineSession`.

    One thread adds requests, steps the pipeline and hands out its tokens. A step that raises ends the session for all.

    Args:
        directory: what was compiled.
        limits: how much it must hold.
        threads: that run one step.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
        MachineError: too little memory for `limits`.
        RecipeError: rotary angles do not hold for `limits.max_length`.
    """

    def __init__(self, directory: Path, limits: Limits, *, threads: int) -> None:
        facts = DecoderFacts.read(directory)
        if facts.longest is not None and limits.max_length > facts.longest:
            raise RecipeError(
                f"the graph's rotary angles hold for {facts.longest} tokens",
                where=str(directory),
                found=limits.max_length,
                remedy=f"set max_length to {facts.longest} or less",
            )
        self.caps = EngineCaps(facts.vocab_size, limits.max_length, limits.max_batch_size, SAMPLING)
        self._graph = directory / GRAPH
        self._properties = {
            "INFERENCE_NUM_THREADS": threads,
            # Sessions of several processes would all be tied to the same cores.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            # Or activations would be rounded to int8 before products with integer weights.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = _blocks(facts, limits)
        scheduler.max_num_seqs = limits.max_batch_size
        scheduler.enable_prefix_caching = False
        with self._readable(facts):
            self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
                str(directory), scheduler, "CPU", {**self._properties, "sampler_num_threads": threads}, {}, {}
            )
        self._facts = facts
        self._scoring: Any = None
        self._ids = itertools.count()
        self._arrived: deque[_Stream] = deque()
        self._changed = threading.Condition()
        self._closing, self._failure = False, ""
        self._thread = threading.Thread(target=self._run, name="optkit-openvino-genai", daemon=True)
        self._thread.start()

    async def submit(self, request: EngineRequest) -> AsyncGenerator[int, None]:
        stream = _Stream(request, asyncio.get_running_loop())
        with self._changed:
            if self._closing:
                raise MachineError(self._failure or "the session is closed")
            self._arrived.append(stream)
            self._changed.notify()
        try:
            while (news := await stream.news.get()) is not None:
                if isinstance(news, Exception):
                    raise news
                for token in news:
                    yield token
        finally:
            stream.left = True

    def scores(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        if self._scoring is None:
            with self._readable(self._facts):
                compiled = openvino.Core().compile_model(_stateless(self._graph), "CPU", self._properties)
                self._scoring = compiled.create_infer_request()
        inputs = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits: npt.NDArray[np.float32] = self._scoring.infer(inputs)["logits"][0].copy()
        return logits

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        self._pipeline = self._scoring = None

    @contextlib.contextmanager
    def _readable(self, facts: DecoderFacts) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise DamagedError(
                f"openvino {openvino.__version__} cannot open it ({reason})",
                where=str(self._graph),
                remedy=f"compile it again, or use openvino {facts.openvino}, which wrote it",
            ) from error

    # --- in the engine's thread

    def _run(self) -> None:
        streams: list[_Stream] = []
        try:
            while self._wait(busy=bool(streams)):
                streams = [*streams, *self._accepted()]
                for stream in streams:
                    if stream.left:
                        stream.handle.cancel()
                # Also for those that were cancelled, whose blocks a step gives back.
                self._pipeline.step()
                streams = [stream for stream in streams if not _delivered(stream)]
        except Exception as error:
            self._failure = f"the engine failed ({' '.join(str(error).split())})"
        with self._changed:
            self._closing = True
            left = [*streams, *self._arrived]
            self._arrived.clear()
        for stream in left:
            if stream.handle is not None:
                stream.handle.cancel()
            stream.put(MachineError(self._failure or "the session was closed"))

    def _wait(self, *, busy: bool) -> bool:
        """Until there is something to do. False: until `close`."""
        with self._changed:
            self._changed.wait_for(lambda: busy or self._arrived or self._closing)
            return not self._closing

    def _accepted(self) -> list[_Stream]:
        """The streams that came, once the pipeline has their requests."""
        accepted = []
        while self._arrived:
            stream = self._arrived.popleft()
            ids = openvino.Tensor(np.array([stream.request.prompt], np.int64))
            try:
                config = _config(stream.request, self.caps.vocab_size)
                stream.handle = self._pipeline.add_request(next(self._ids), ids, config)
            except Exception as error:  # what the pipeline does not take fails alone
                stream.put(error)
                continue
            accepted.append(stream)
        return accepted


def _stateless(graph: Path) -> Any:
    """The graph for whole texts alone: each state is as it begins, empty.

    Not with its states: OpenVINO 2026.4 leaves a thread behind for every stateful graph that it compiles.
    """
    model = openvino.Core().read_model(graph)
    for operator in model.get_ordered_ops():
        if operator.get_type_name() == "ReadValue":
            for target in operator.output(0).get_target_inputs():
                target.replace_source_output(operator.input_value(0))
    for sink in model.get_sinks():
        model.remove_sink(sink)
    for variable in model.get_variables():
        model.remove_variable(variable)
    return model


def _blocks(facts: DecoderFacts, limits: Limits) -> int:
    tokens, each = limits.kv_cache_tokens, -(-limits.max_length // BLOCK_SIZE)
    numbers = sum(heads * (key + value) for heads, key, value in facts.layers)
    return blocks_that_fit(
        limits,
        wanted=limits.max_batch_size * each if tokens is None else -(-tokens // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        block_bytes=BLOCK_SIZE * numbers * np.dtype(np.float32).itemsize,
    )


def _config(request: EngineRequest, nothing: int) -> Any:
    """How the pipeline is asked for a request's output.

    Args:
        request: as it came.
        nothing: a token id that no output can hold; it takes none for the end of a text that goes on.
    """
    sampling = request.sampling
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = request.max_tokens
    config.eos_token_id = nothing
    config.stop_token_ids = {nothing, *request.stop_tokens}
    config.repetition_penalty = sampling.repetition_penalty
    if sampling.temperature > 0:
        config.do_sample = True
        config.rng_seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        if sampling.top_k:
            config.top_k = sampling.top_k
    return config


def _delivered(stream: _Stream) -> bool:
    """Hand out what came of a request, and say whether it has ended."""
    running = stream.handle.get_status() == openvino_genai.GenerationStatus.RUNNING
    tokens: list[int] = []
    while stream.handle.can_read():
        for output in stream.handle.read().values():
            tokens += output.generated_ids
    if tokens and not stream.left:
        stream.put(tokens)
    if not running:
        stream.put(None)
    return not running
