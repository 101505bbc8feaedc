"""Repetition, frequency and presence penalties: which tokens a sample has seen, and what that takes from its logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from optkit.engine.request import SamplingParams

__all__ = ["Penalties"]

Integers = npt.NDArray[np.int64]

_UNSEEN = -1


class Penalties:
    """The penalized samples, each in a slot.

    A row's work is in proportion to the tokens that it has seen, not to the vocabulary.
    """

    def __init__(self, vocab_size: int) -> None:
        self._free: list[int] = []
        self._counts = np.full((0, vocab_size), _UNSEEN, dtype=np.int32)
        """How often a token is in the output; 0 if it is in the prompt only."""
        self._seen = np.zeros((0, 64), dtype=np.int64)
        self._numbers = np.zeros(0, dtype=np.int64)
        """Of tokens in `_seen`."""
        self._repetition, self._frequency, self._presence = (np.zeros(0, dtype=np.float32) for _ in range(3))

    def open(self, params: SamplingParams, prompt: Sequence[int]) -> int:
        """Take a slot."""
        if not self._free:
            self._add_slots()
        slot = self._free.pop()
        self._repetition[slot] = np.clip(params.repetition_penalty, 1e-30, 1e30)
        self._frequency[slot], self._presence[slot] = params.frequency_penalty, params.presence_penalty
        if params.repetition_penalty != 1:
            self._see(slot, np.unique(np.asarray(prompt, dtype=np.int64)))
        return slot

    def close(self, slot: int) -> None:
        self._counts[slot, self._seen[slot, : self._numbers[slot]]] = _UNSEEN
        self._numbers[slot] = 0
        self._free.append(slot)

    def accept(self, slots: Integers, tokens: Integers) -> None:
        """Tokens become output; a slot may stand there several times."""
        vocab = self._counts.shape[1]
        places, times = np.unique(slots * vocab + tokens, return_counts=True)
        slots, tokens = np.divmod(places, vocab)
        new = self._counts[slots, tokens] == _UNSEEN
        for slot in np.unique(slots[new]).tolist():
            self._see(slot, tokens[new & (slots == slot)])
        self._counts[slots, tokens] += times

    def apply(self, logits: npt.NDArray[np.float32], rows: Integers, slots: Integers) -> None:
        """Take what is due from `logits[rows]`, in place.

        Args:
            logits: `[any, vocabulary]` float32.
            rows: of `logits`, each once.
            slots: of these rows.
        """
        numbers = self._numbers[slots]
        width = int(numbers.max(initial=0))
        tokens = self._seen[slots, :width][np.arange(width) < numbers[:, None]]
        rows, slots = np.repeat(rows, numbers), np.repeat(slots, numbers)
        counts, repetition = self._counts[slots, tokens], self._repetition[slots]
        values = logits[rows, tokens]
        with np.errstate(over="ignore"):
            values = np.where(values > 0, values / repetition, values * repetition)
            values -= self._frequency[slots] * counts + self._presence[slots] * (counts > 0)
        logits[rows, tokens] = np.minimum(values, np.finfo(np.float32).max)

    def _see(self, slot: int, tokens: Integers) -> None:
        start, end = self._numbers[slot], self._numbers[slot] + len(tokens)
        if end > self._seen.shape[1]:
            more = max(int(end), 2 * self._seen.shape[1]) - self._seen.shape[1]
            self._seen = np.pad(self._seen, ((0, 0), (0, more)))
        self._seen[slot, start:end] = tokens
        self._numbers[slot] = end
        self._counts[slot, tokens] = 0

    def _add_slots(self) -> None:
        there = len(self._numbers)
        more = max(4, there)
        self._counts = np.pad(self._counts, ((0, more), (0, 0)), constant_values=_UNSEEN)
        self._seen = np.pad(self._seen, ((0, more), (0, 0)))
        self._numbers = np.pad(self._numbers, (0, more))
        self._repetition, self._frequency, self._presence = (
            np.pad(values, (0, more)) for values in (self._repetition, self._frequency, self._presence)
        )
        self._free += reversed(range(there, there + more))
