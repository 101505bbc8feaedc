"""The engine of models of one step, such as encoders: token sequences in, one batch a step, arrays out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedKeyList

from optkit.backends import TensorSession
from optkit.batching import Batcher, RequestView, Schedule, Start
from optkit.errors import OptkitError, RecipeError, RequestError
from optkit.steps import Caps, Limits

__all__ = ["OUTPUT", "Encoded", "TensorEngine", "TensorStats", "padded"]

Floats = npt.NDArray[np.float32]
OUTPUT = "last_hidden_state"
"""Of a session that encodes text."""
NOT_FINITE = "the model gave NaN or infinite values"
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_BOUNDLESS = 1 << 62


@dataclass(frozen=True, slots=True)
class Encoded:
    """The end of one request."""

    request: int
    finished: Literal["done", "cancelled", "error"]
    hidden: Floats | None = None
    """`[tokens, hidden]`, the last layer's output at each token, when `finished` is `done`. A view into the batch's."""
    error: str = ""
    """What went wrong, when `finished` is `error`."""


@dataclass(slots=True)
class TensorStats:
    """What an engine has done since it was made."""

    steps: int = 0
    requests: int = 0
    """Accepted."""
    tokens: int = 0
    """Computed, without padding."""
    padding: int = 0
    """Tokens computed only because the sequences of a batch differ in length."""


class TensorEngine:
    """Drives one session with one batcher, in the caller's thread.

    ```python
    engine = TensorEngine(session, batcher, limits, vocab_size)
    request = engine.add((101, 7592, 102))
    while engine.busy:
        for encoded in engine.step():
            print(encoded.request, encoded.hidden.shape)
        time.sleep(engine.wait or 0)
    ```

    A schedule is one call of the model, which ends its requests. When the call raises, the batch is run again in
    halves, so that only the request that cannot be computed fails; one whose output is not finite fails alone too.

    Args:
        session: with the inputs `input_ids` and `attention_mask` `[batch, tokens]` int64, and `token_type_ids` where
            the model has it; its output is `last_hidden_state` `[batch, tokens, hidden]`. The engine does not close it.
        batcher: decides who shares a batch.
        limits: that the session was opened for.
        vocab_size: of the model.
        clock: seconds, for the batcher; tests pass their own.

    Raises:
        RecipeError: from `step`: the strategy cuts sequences that an encoder needs whole.
        OptkitError: the session has other inputs or outputs.
    """

    def __init__(
        self,
        session: TensorSession,
        batcher: Batcher,
        limits: Limits,
        vocab_size: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if "input_ids" not in session.inputs or set(session.inputs) - _INPUTS or OUTPUT not in session.outputs:
            raise OptkitError(f"no text encoder: it maps {sorted(session.inputs)} to {sorted(session.outputs)}")
        self.stats = TensorStats()
        self.wait: float | None = None
        """Seconds after which `step` should be called again, when the batcher waits for company; None: no such time."""
        self._session, self._batcher, self._clock = session, batcher, clock
        rows = min(limits.max_batch_size, batcher.max_sequences)
        self._memory = _NoMemory(Caps("none", 0, 0, rows, True, vocab_size, limits.max_length))
        self._ids = count()
        self._alive: dict[int, _Request] = {}
        self._waiting: Any = SortedKeyList(key=_place)
        self._ended: list[Encoded] = []

    @property
    def busy(self) -> bool:
        """Whether any request is alive, or an end was not fetched yet."""
        return bool(self._alive or self._ended)

    def add(self, ids: tuple[int, ...], *, priority: int = 0) -> int:
        """Accept a sequence of token ids and return the request's id.

        Raises:
            RequestError: it is empty, too long, or holds unknown tokens.
        """
        caps = self._memory.caps
        if not ids:
            raise RequestError("there are no tokens to encode", remedy="give at least one token")
        if len(ids) > caps.max_length:
            raise RequestError(
                f"there are {len(ids)} tokens to encode, a sequence can have {caps.max_length}",
                remedy="shorten it, or raise max_length in the recipe",
            )
        if min(ids) < 0 or max(ids) >= caps.vocab_size:
            raise RequestError(f"there are token ids outside 0 to {caps.vocab_size - 1}")
        request = _Request(next(self._ids), ids, priority, self._clock())
        request.key = self._batcher.queue_key(request)
        self._alive[request.id] = request
        self._waiting.add(request)
        self.stats.requests += 1
        return request.id

    def cancel(self, request: int) -> None:
        """End a request; what says so comes with the next step. One that has ended already is left alone."""
        if request in self._alive:
            self._end(self._alive[request], Encoded(request, "cancelled"))

    def step(self) -> list[Encoded]:
        """Run one batch, if the batcher wants one, and return the requests that ended since the last call."""
        self.wait = None
        if self._alive:
            plan = self._batcher.plan(self._waiting, (), self._memory, self._clock())
            if isinstance(plan, Schedule):
                self._run(self._batch(plan))
            elif plan.seconds is None and not self._ended:
                raise OptkitError(f"{self._strategy} waits for ever with {len(self._waiting)} requests waiting")
            else:
                self.wait = plan.seconds
        ended, self._ended = self._ended, []
        return ended

    @property
    def _strategy(self) -> str:
        return type(self._batcher).__name__

    def _batch(self, plan: Schedule) -> list[_Request]:
        """The sequences that get all their tokens. One that would be cut in chunks stays in the queue: it has no KV."""
        shares = [(self._alive[share.sequence], share.tokens) for share in plan.shares]
        batch = [request for request, tokens in shares if tokens >= request.pending]
        if not batch or len(batch) > self._memory.caps.max_batch_size:
            given = f"{shares[0][1]} of {shares[0][0].pending} tokens" if shares else "nothing"
            raise RecipeError(
                f"{self._strategy} gives an encoder {given if not batch else f'{len(batch)} sequences'} to compute",
                remedy="raise its limit of tokens to max_length, or choose another batching strategy",
            )
        return batch

    def _run(self, batch: Sequence[_Request]) -> None:
        inputs = padded([request.ids for request in batch], self._session.inputs)
        try:
            hidden = self._session.run(inputs)[OUTPUT].astype(np.float32, copy=False)
        except Exception as error:
            if len(batch) == 1:
                self._end(batch[0], Encoded(batch[0].id, "error", error=f"{type(error).__name__}: {error}"))
                return
            self._run(batch[: len(batch) // 2])
            self._run(batch[len(batch) // 2 :])
            return
        self.stats.steps += 1
        tokens = sum(request.pending for request in batch)
        self.stats.tokens += tokens
        self.stats.padding += inputs["input_ids"].size - tokens
        for row, request in enumerate(batch):
            found = hidden[row, : request.pending]
            if np.isfinite(found).all():
                self._end(request, Encoded(request.id, "done", found))
            else:
                self._end(request, Encoded(request.id, "error", error=NOT_FINITE))

    def _end(self, request: _Request, encoded: Encoded) -> None:
        del self._alive[request.id]
        self._waiting.remove(request)
        self._ended.append(encoded)


def padded(sequences: Sequence[tuple[int, ...]], names: Iterable[str]) -> dict[str, npt.NDArray[np.generic]]:
    """The inputs of one call: sequences of token ids, padded on the right to the longest.

    Args:
        sequences: at least one.
        names: of the session's inputs.

    Returns:
        By name, `[sequences, tokens]` int64; token and type are 0 where the attention mask is.
    """
    shape = len(sequences), max(len(ids) for ids in sequences)
    arrays = {name: np.zeros(shape, np.int64) for name in names}
    for row, ids in enumerate(sequences):
        arrays["input_ids"][row, : len(ids)] = ids
        if "attention_mask" in arrays:
            arrays["attention_mask"][row, : len(ids)] = 1
    return dict(arrays)


class _Request:
    """A request and its only sequence: implements `RequestView` and `SequenceView`."""

    computed = drafts = max_tokens = 0
    samples = 1

    def __init__(self, identity: int, ids: tuple[int, ...], priority: int, arrived: float) -> None:
        self.id, self.ids, self.priority, self.arrived = identity, ids, priority, arrived
        self.prompt_tokens = self.pending = len(ids)
        self.key: tuple[float, ...] = ()

    @property
    def sequences(self) -> tuple[_Request]:
        return (self,)


class _NoMemory:
    """Nothing is kept between steps, so nothing is ever short. Implements `MemoryView`."""

    free = _BOUNDLESS

    def __init__(self, caps: Caps) -> None:
        self.caps = caps

    def start(self, request: RequestView) -> Start:
        return Start(0, 0)

    def needed(self, request: RequestView, tokens: Sequence[int], cached: int = 0) -> int:
        return 0

    def held(self, request: RequestView) -> int:
        return 0

    def released(self, requests: Collection[RequestView]) -> int:
        return 0


def _place(request: _Request) -> tuple[tuple[float, ...], int]:
    return request.key, request.id
