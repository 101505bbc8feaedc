"""The engine of text encoders: token sequences in, one batch a step, the last layer's output back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from optkit.backends import TensorSession
from optkit.batching import Batcher
from optkit.engine.one_step import OneStepEngine, Outcome
from optkit.errors import OptkitError, RequestError
from optkit.steps import Limits

__all__ = ["OUTPUT", "TensorEngine", "encodes_text", "padded"]

Floats = npt.NDArray[np.float32]
OUTPUT = "last_hidden_state"
"""Of a session that encodes text."""
NOT_FINITE = "the model gave NaN or infinite values"
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}


def encodes_text(session: TensorSession) -> bool:
    """Whether a session is that of a text encoder, by the names of its inputs and outputs."""
    return "input_ids" in session.inputs and not set(session.inputs) - _INPUTS and OUTPUT in session.outputs


class TensorEngine(OneStepEngine[tuple[int, ...], Floats]):
    """Drives one session with one batcher. One thread calls it at a time.

    ```python
    engine = TensorEngine(session, batcher, limits, vocab_size)
    request = engine.add((101, 7592, 102))
    while engine.busy:
        for outcome in engine.step():
            print(outcome.request, outcome.result.shape)
        time.sleep(engine.wait or 0)
    ```

    See `OneStepEngine`; a sequence whose output is not finite fails alone too. A result is `[tokens, hidden]` float32,
    the last layer's output at each token.

    Args:
        session: with the inputs `input_ids` and `attention_mask` `[batch, tokens]` int64, and `token_type_ids` where
            the model has it; its output is `last_hidden_state` `[batch, tokens, hidden]`. The engine does not close it.
        batcher: decides who shares a batch.
        limits: that the session was opened for.
        vocab_size: of the model.
        clock: seconds, for the batcher; tests pass their own.

    Raises:
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
        if not encodes_text(session):
            raise OptkitError(f"no text encoder: it maps {sorted(session.inputs)} to {sorted(session.outputs)}")
        super().__init__(batcher, limits, vocab_size, clock, session.streams)
        self._session = session

    def add(self, payload: tuple[int, ...], *, priority: int = 0) -> int:
        """Accept a sequence of token ids and return the request's id.

        Raises:
            RequestError: it is empty, too long, or holds unknown tokens.
        """
        ids, caps = payload, self._memory.caps
        if not ids:
            raise RequestError("there are no tokens to encode", remedy="give at least one token")
        if len(ids) > caps.max_length:
            raise RequestError(
                f"there are {len(ids)} tokens to encode, a sequence can have {caps.max_length}",
                remedy="shorten it, or raise max_length in the recipe",
            )
        if min(ids) < 0 or max(ids) >= caps.vocab_size:
            raise RequestError(f"there are token ids outside 0 to {caps.vocab_size - 1}")
        return self._accept(ids, tokens=len(ids), priority=priority)

    def _compute(self, batch: Sequence[tuple[int, ...]]) -> list[Floats]:
        inputs = padded(batch, self._session.inputs)
        hidden = self._session.run(inputs)[OUTPUT].astype(np.float32, copy=False)
        return [hidden[row, : len(ids)] for row, ids in enumerate(batch)]

    def _count(self, batch: Sequence[tuple[int, ...]]) -> None:
        lengths = [len(ids) for ids in batch]
        self.stats.tokens += sum(lengths)
        self.stats.padding += max(lengths) * len(lengths) - sum(lengths)

    def _outcome(self, request: int, result: Floats) -> Outcome[Floats]:
        if np.isfinite(result).all():
            return Outcome(request, "done", result)
        return Outcome(request, "error", error=NOT_FINITE)


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
