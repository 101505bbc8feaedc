"""The step loop: plan, reserve, execute, sample, commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from optkit.backends import TokenSession
from optkit.batching import Batcher, Wait
from optkit.engine.blocks import BlockPool
from optkit.engine.request import Event, FinishReason, Request, Sequence
from optkit.engine.sampler import sample
from optkit.errors import MachineError, OptkitError
from optkit.steps import StepPlan

__all__ = ["Engine"]


class Engine:
    """Drives one session with one batcher, in the caller's thread.

    ```python
    engine = Engine(session, batcher, eos=(tokenizer.eos_token_id,))
    for event in engine.stream(Request(prompt, SamplingParams(max_tokens=64))):
        print(tokenizer.decode(event.token), end="")
    ```

    Args:
        session: the open runtime. The engine does not close it.
        batcher: decides what each step holds.
        eos: token ids that end a sequence, unless its request ignores them.
        clock: seconds, for the batcher; tests pass their own.
    """

    def __init__(
        self,
        session: TokenSession,
        batcher: Batcher,
        *,
        eos: tuple[int, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._batcher = batcher
        self._eos = frozenset(eos)
        self._clock = clock
        self._pool = BlockPool(session.caps)
        self._waiting: dict[int, Sequence] = {}
        self._running: dict[int, Sequence] = {}
        self._ids = count()

    @property
    def busy(self) -> bool:
        """Whether any request is alive."""
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> int:
        """Accept a request and return its id.

        Raises:
            MachineError: it could never fit into the KV cache, or its prompt is empty or holds unknown tokens.
        """
        caps = self._session.caps
        total, room = len(request.prompt) + request.params.max_tokens, caps.block_size * caps.blocks
        limit = caps.block_size if caps.kv == "slot" else room
        if not request.prompt:
            raise MachineError("the prompt is empty", remedy="give at least one token")
        if not all(0 <= token < caps.vocab_size for token in request.prompt):
            raise MachineError(f"the prompt holds token ids outside 0 to {caps.vocab_size - 1}")
        if total > limit:
            raise MachineError(
                f"a prompt of {len(request.prompt)} tokens and {request.params.max_tokens} output tokens need {total} "
                f"positions of KV cache, the session has {limit} for one sequence",
                remedy="shorten them or raise max_length in the recipe",
            )
        identity = next(self._ids)
        self._waiting[identity] = Sequence(identity, request, list(request.prompt), self._clock())
        return identity

    def step(self) -> list[Event]:
        """Run one step, if the batcher wants one, and return the new tokens."""
        waiting = [sequence.view() for sequence in self._waiting.values()]
        running = [sequence.view() for sequence in self._running.values()]
        plan = self._batcher.plan(waiting, running, self._pool.view(), self._clock())
        if isinstance(plan, Wait):
            if plan.seconds is None and self.busy:
                raise OptkitError(f"{type(self._batcher).__name__} waits for ever with {len(waiting)} requests waiting")
            return []
        started = self._reserve(plan)
        try:
            result = self._session.execute(plan)
        except BaseException:
            # The step never happened: what it started waits again, in its old place at the head of the queue.
            for sequence in started:
                self._pool.release(sequence.blocks)
                sequence.blocks = ()
                del self._running[sequence.id]
            self._waiting = {sequence.id: sequence for sequence in started} | self._waiting
            raise
        return self._commit(plan, [logits[-1] if len(logits) else None for logits in result.logits])

    def stream(self, request: Request) -> Iterator[Event]:
        """Add one request and yield its tokens as they come.

        For an engine with one caller: other requests go on beside it, but their events are not kept for anybody.
        """
        identity = self.add(request)
        finished = False
        while not finished:
            for event in self.step():
                if event.request == identity:
                    finished = event.finished is not None
                    yield event

    def _reserve(self, plan: StepPlan) -> list[Sequence]:
        started = []
        for row in plan.rows:
            if row.sequence in self._waiting:
                self._pool.take(row.blocks)
                sequence = self._waiting.pop(row.sequence)
                sequence.blocks = row.blocks
                self._running[sequence.id] = sequence
                started.append(sequence)
        return started

    def _commit(self, plan: StepPlan, last: list[np.ndarray | None]) -> list[Event]:
        sampled = []
        for row, logits in zip(plan.rows, last, strict=True):
            sequence = self._running[row.sequence]
            sequence.computed = row.computed + len(row.tokens)
            if logits is not None:
                sampled.append((sequence, logits))
        if not sampled:
            return []
        tokens = sample(
            np.stack([logits for _, logits in sampled]),
            [sequence.request.params for sequence, _ in sampled],
            [len(sequence.tokens) for sequence, _ in sampled],
        )
        return [self._append(sequence, token) for (sequence, _), token in zip(sampled, tokens, strict=True)]

    def _append(self, sequence: Sequence, token: int) -> Event:
        sequence.tokens.append(token)
        reason = self._finish_reason(sequence, token)
        if reason is not None:
            del self._running[sequence.id]
            self._pool.release(sequence.blocks)
            if not self.busy:
                self._pool.check()
        return Event(sequence.id, token, reason)

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.request.params
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            return "stop"
        return "length" if sequence.output >= params.max_tokens else None
