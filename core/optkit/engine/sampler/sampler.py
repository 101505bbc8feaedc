"""The samples that are alive, how each of them is sampled, and one token for each row of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optkit.engine.request import SamplingParams, TokenLogprob
from optkit.engine.sampler.drawing import Filters, draw
from optkit.engine.sampler.penalties import Penalties
from optkit.engine.sampler.philox import uniform
from optkit.engine.sampler.scoring import score
from optkit.engine.structure import Matcher, allowed_tokens

__all__ = ["Sampled", "Sampler", "finite_rows", "likeliest_tokens"]

Integers = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

_MAX = np.finfo(np.float32).max
_NONE = -1

_SETTINGS = np.dtype(
    [
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("seed", np.uint64),
        ("sample", np.uint64),
        ("penalties", np.int64),  # slot, or none
        ("end_from", np.int64),  # the first position that an end or stop token may take; 0: any
        ("biased", np.bool_),
        ("constrained", np.bool_),
        ("logprobs", np.int64),  # most likely ones to give, or none
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What `sample` gives back, one entry for each row."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]
    """Where the parameters ask for it."""


class Sampler:
    """Chooses tokens as each sample's `SamplingParams` say.

    A row's token is the same to the last bit whatever other rows are in the batch. Of tokens that tie, the lower id
    counts as the more likely one.

    Args:
        vocab_size: of the model's logits.
        end_tokens: of the model.
    """

    def __init__(self, vocab_size: int, end_tokens: frozenset[int] = frozenset()) -> None:
        self._vocab_size, self._end_tokens = vocab_size, end_tokens
        self._settings = np.zeros(0, dtype=_SETTINGS)
        self._free: list[int] = []
        self._bans: dict[int, Integers] = {}
        self._biases: dict[int, tuple[Integers, npt.NDArray[np.float32]]] = {}
        self._matchers: dict[int, Matcher] = {}
        self._penalties = Penalties(vocab_size)
        self._plain: set[int] = set()  # the likeliest token, whatever it is, and nothing said of it

    def open(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        seed: int,
        sample: int = 0,
        matcher: Matcher | None = None,
    ) -> int:
        """Register one sample of a request, and return its handle: a small number, which is used again once closed.

        Args:
            params: how it is sampled; their seed and structure are what the next arguments say.
            prompt: token ids.
            seed: below 2**64.
            sample: its number among the samples of its request.
            matcher: of its structure, if it has one.
        """
        if not self._free:
            there = len(self._settings)
            more = max(16, there)
            self._settings = np.pad(self._settings, (0, more))
            self._free += reversed(range(there, there + more))
        handle = self._free.pop()
        bans = sorted(self._end_tokens.union(params.stop_token_ids)) if params.min_tokens else []
        if bans:
            self._bans[handle] = np.array(bans)
        if params.logit_bias:
            values = np.clip(list(params.logit_bias.values()), -_MAX, _MAX)
            self._biases[handle] = np.array(list(params.logit_bias)), values.astype(np.float32)
        if matcher is not None:
            self._matchers[handle] = matcher
        self._settings[handle] = (
            params.temperature,
            params.top_k if params.top_k < self._vocab_size else 0,
            params.top_p,
            params.min_p,
            seed,
            sample,
            self._penalties.open(params, prompt) if _penalized(params) else _NONE,
            len(prompt) + params.min_tokens if bans else 0,
            bool(params.logit_bias),
            matcher is not None,
            params.logprobs or 0 if params.needs_logprobs else _NONE,
        )
        altered = bans or params.logit_bias or matcher is not None or _penalized(params)
        if params.temperature == 0 and not (altered or params.needs_logprobs):
            self._plain.add(handle)
        return handle

    def close(self, handle: int) -> None:
        """Forget a sample."""
        slot = int(self._settings[handle]["penalties"])
        if slot != _NONE:
            self._penalties.close(slot)
        for kept in (self._bans, self._biases, self._matchers):
            kept.pop(handle, None)
        self._plain.discard(handle)
        self._free.append(handle)

    def sample(
        self,
        logits: Logits,
        handles: Sequence[int],
        positions: Sequence[int],
        likeliest: Sequence[int] | None = None,
    ) -> Sampled:
        """One token for each row. Changes neither the samples nor `logits`.

        Args:
            logits: `[rows, vocabulary]` float32, all `finite_rows`.
            handles: of each row. Where the parameters do not depend on history, a sample may have several rows.
            positions: in prompt and output together, that each row's token will take.
            likeliest: `likeliest_tokens(logits)`, where they are known.
        """
        if self._plain.issuperset(handles):
            found = likeliest_tokens(logits) if likeliest is None else list(likeliest)
            return Sampled(found, [None] * len(handles))
        rows = np.asarray(handles, dtype=np.int64)
        settings, places = self._settings[rows], np.asarray(positions, dtype=np.int64)
        banned = places < settings["end_from"]
        altered = banned | settings["biased"] | settings["constrained"] | (settings["penalties"] != _NONE)
        if altered.any():
            tokens = np.empty(len(rows), dtype=np.int64)
            own = logits[altered]
            self._alter(own, rows[altered], settings[altered], banned[altered])
            tokens[altered] = _choose(own, settings[altered], places[altered])
            if not altered.all():
                tokens[~altered] = _choose(logits[~altered], settings[~altered], places[~altered])
        else:
            tokens = _choose(logits, settings, places)
        return Sampled(tokens.tolist(), _scores(logits, tokens, settings["logprobs"]))

    def accept(self, handles: Sequence[int], tokens: Sequence[int]) -> None:
        """The tokens become output of their samples, in this order."""
        if self._plain.issuperset(handles):
            return
        slots = self._settings["penalties"][np.asarray(handles, dtype=np.int64)]
        penalized = slots != _NONE
        if penalized.any():
            self._penalties.accept(slots[penalized], np.asarray(tokens, dtype=np.int64)[penalized])
        if self._matchers:
            for handle, token in zip(handles, tokens, strict=True):
                if handle in self._matchers:
                    self._matchers[handle].accept(token)

    def _alter(
        self, logits: Logits, handles: Integers, settings: npt.NDArray[np.void], banned: npt.NDArray[np.bool_]
    ) -> None:
        constrained = np.flatnonzero(settings["constrained"])
        if len(constrained):
            allowed = allowed_tokens([self._matchers[one] for one in handles[constrained].tolist()], logits.shape[1])
            # Even a token that the model thinks impossible is better than one that breaks the structure.
            logits[constrained] = np.where(allowed, np.maximum(logits[constrained], -_MAX), -np.inf)
        some = np.flatnonzero(banned)
        if len(some):
            _ban(logits, some, [self._bans[one] for one in handles[some].tolist()])
        some = np.flatnonzero(settings["biased"])
        if len(some):
            biases = [self._biases[one] for one in handles[some].tolist()]
            at = np.repeat(some, [len(ids) for ids, _ in biases]), np.concatenate([ids for ids, _ in biases])
            with np.errstate(over="ignore"):
                logits[at] = np.minimum(logits[at] + np.concatenate([values for _, values in biases]), _MAX)
        slots = settings["penalties"]
        some = np.flatnonzero(slots != _NONE)
        if len(some):
            self._penalties.apply(logits, some, slots[some])


def likeliest_tokens(logits: Logits) -> list[int]:
    """The token of each row with the greatest logit, or with the first NaN. `logits` is `[rows, vocabulary]`."""
    found: list[int] = logits.argmax(axis=1).tolist()
    return found


def finite_rows(logits: Logits, likeliest: Sequence[int]) -> list[bool]:
    """Which rows can be sampled: those without NaN and plus infinity, and not minus infinity throughout.

    Args:
        logits: `[rows, vocabulary]`.
        likeliest: their `likeliest_tokens`.
    """
    return [math.isfinite(logits[place]) for place in enumerate(likeliest)]


def _penalized(params: SamplingParams) -> bool:
    return bool(params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1)


def _ban(logits: Logits, rows: Integers, bans: list[Integers]) -> None:
    at = np.repeat(rows, [len(ids) for ids in bans]), np.concatenate(bans)
    before = logits[at]
    logits[at] = -np.inf
    # Where nothing else can come, such as after the end of a structure, the end comes early.
    stuck = np.isin(at[0], rows[logits[rows].max(axis=1) == -np.inf])
    logits[at] = np.where(stuck, before, -np.inf)


def _choose(logits: Logits, settings: npt.NDArray[np.void], positions: Integers) -> Integers:
    random = settings["temperature"] > 0
    if not random.any():
        likeliest: Integers = logits.argmax(axis=1)
        return likeliest
    if not random.all():
        tokens = np.empty(len(logits), dtype=np.int64)
        for which in (random, ~random):
            tokens[which] = _choose(logits[which], settings[which], positions[which])
        return tokens
    points = uniform(settings["seed"], settings["sample"], positions.astype(np.uint64))
    filters = Filters(settings["temperature"], settings["top_k"], settings["top_p"], settings["min_p"])
    return draw(logits, filters, points)


def _scores(logits: Logits, tokens: Integers, tops: Integers) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(tokens)
    wanted = np.flatnonzero(tops != _NONE)
    if len(wanted):
        scored = score(logits[wanted], tokens[wanted].tolist(), int(tops.max()))
        for row, top, one in zip(wanted.tolist(), tops[wanted].tolist(), scored, strict=True):
            found[row] = TokenLogprob(one.token, one.logprob, one.top[:top])
    return found
