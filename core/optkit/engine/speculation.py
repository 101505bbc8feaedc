"""Guessing tokens that the model then checks many at a time. A guess changes when a token comes, never which one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from optkit.backends import TokenSession
from optkit.engine.blocks import BlockPool
from optkit.engine.sequence import Group
from optkit.steps import Row, StepPlan

__all__ = ["DraftModel", "Drafter", "PromptLookup", "draft"]


class Drafter(Protocol):
    """Guesses what comes next."""

    def propose(self, sequences: Sequence[tuple[int, Sequence[int]]], room: Sequence[int]) -> list[tuple[int, ...]]:
        """Tokens that may follow each sequence.

        Args:
            sequences: id and all tokens so far; between calls a sequence only grows.
            room: the longest guess that each can take.

        Returns:
            One guess for each, possibly empty.
        """
        ...

    def forget(self, sequence: int) -> None:
        """A sequence has ended; one that was never seen may be forgotten too."""
        ...


def draft(drafter: Drafter, running: Iterable[Group]) -> None:
    """Give guesses to every sequence that only its newest token keeps from the next one.

    Not to those with penalties or a structure: there a token's distribution depends on the ones before it by more than
    the model does, so several cannot be sampled at once.
    """
    fit = [
        sequence
        for group in running
        if group.forked and not group.request.params.depends_on_history
        for sequence in group.live
        if sequence.pending == 1
    ]
    # One token less than there is room for: the check itself brings one.
    room = [sequence.group.max_total - len(sequence.tokens) - 1 for sequence in fit]
    guesses = drafter.propose([(one.id, one.tokens) for one in fit], room)
    for sequence, guess in zip(fit, guesses, strict=True):
        sequence.draft = guess


class PromptLookup:
    """Guesses that text repeats itself: what followed the last tokens where they stood before, follows again.

    Costs next to nothing, and pays where output quotes its prompt: summaries, edits, code
    (https://github.com/apoorvumang/prompt-lookup-decoding; vLLM's `ngram`).

    Args:
        tokens: of one guess, at most.
        longest: n-gram that is looked up first.
        shortest: n-gram that is looked up last. Short ones are often wrong, and a wrong guess costs computation.
    """

    def __init__(self, tokens: int = 4, longest: int = 4, shortest: int = 2) -> None:
        if not (tokens >= 1 and 1 <= shortest <= longest):
            raise ValueError("tokens is at least 1, and shortest at least 1 and at most longest")
        self._tokens, self._sizes = tokens, range(longest, shortest - 1, -1)
        self._seen: dict[int, _Index] = {}

    def propose(self, sequences: Sequence[tuple[int, Sequence[int]]], room: Sequence[int]) -> list[tuple[int, ...]]:
        guesses = []
        for (identity, tokens), most in zip(sequences, room, strict=True):
            index = self._seen.setdefault(identity, _Index())
            start = index.find(tokens, self._sizes)
            guesses.append(() if start is None else tuple(tokens[start : start + min(self._tokens, most)]))
        return guesses

    def forget(self, sequence: int) -> None:
        self._seen.pop(sequence, None)


class _Index:
    """Where each n-gram of one sequence stood last, its end excepted."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._done = 0

    def find(self, tokens: Sequence[int], sizes: Sequence[int]) -> int | None:
        for end in range(self._done + 1, len(tokens)):
            for size in sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._done = max(self._done, len(tokens) - 1)
        found = (self._after.get(tuple(tokens[-size:])) for size in sizes if size <= len(tokens))
        return next((start for start in found if start is not None), None)


class DraftModel:
    """Guesses with a smaller model of the same vocabulary, greedily (arXiv:2211.17192, arXiv:2302.01318).

    Args:
        session: of the smaller model; the caller closes it. A sequence for which its KV cache has no block left, or
            that is longer than it can hold, gets no guess.
        tokens: of one guess, at most.
    """

    def __init__(self, session: TokenSession, tokens: int = 4) -> None:
        if tokens < 1:
            raise ValueError("tokens is at least 1")
        self._session, self._tokens = session, tokens
        self._pool = BlockPool(session.caps.blocks)
        self._states: dict[int, _State] = {}

    def propose(self, sequences: Sequence[tuple[int, Sequence[int]]], room: Sequence[int]) -> list[tuple[int, ...]]:
        guesses: dict[int, list[int]] = {identity: [] for identity, _ in sequences}
        active = [
            (identity, list(tokens), most) for (identity, tokens), most in zip(sequences, room, strict=True) if most > 0
        ]
        for identity, tokens, _ in active:
            self._align(identity, tokens)
        for done in range(self._tokens):
            active = [one for one in active if one[2] > done and self._grown(one[0], len(one[1]))]
            for start in range(0, len(active), self._session.caps.max_batch_size):
                part = active[start : start + self._session.caps.max_batch_size]
                rows = [self._row(identity, tokens) for identity, tokens, _ in part]
                logits = self._session.execute(StepPlan(tuple(rows))).logits
                for (identity, tokens, _), row in zip(part, logits, strict=True):
                    self._states[identity].computed = list(tokens)
                    tokens.append(int(row[-1].argmax()))
                    guesses[identity].append(tokens[-1])
        return [tuple(guesses[identity]) for identity, _ in sequences]

    def forget(self, sequence: int) -> None:
        state = self._states.pop(sequence, None)
        if state is not None:
            self._pool.release(state.blocks)

    def _align(self, identity: int, tokens: Sequence[int]) -> None:
        """Forget what was computed of guesses that turned out wrong."""
        state = self._states.setdefault(identity, _State())
        same = 0
        for mine, theirs in zip(state.computed, tokens, strict=False):
            if mine != theirs:
                break
            same += 1
        # The last token is computed again if need be: its logits are the first guess.
        state.computed = state.computed[: min(same, len(tokens) - 1)]

    def _grown(self, identity: int, length: int) -> bool:
        caps, state = self._session.caps, self._states[identity]
        missing = -(-length // caps.block_size) - len(state.blocks)
        if length > caps.max_length or missing > self._pool.free:
            return False
        state.blocks += tuple(self._pool.take() for _ in range(missing))
        return True

    def _row(self, identity: int, tokens: Sequence[int]) -> Row:
        state = self._states[identity]
        computed = len(state.computed)
        return Row(identity, tuple(tokens[computed:]), computed, state.blocks)


class _State:
    """What the smaller model has of one sequence."""

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.blocks: tuple[int, ...] = ()
