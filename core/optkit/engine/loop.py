"""The step loop: plan, reserve, execute, sample, commit."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedKeyList, SortedList

from optkit.backends import TokenSession
from optkit.batching import Batcher, Schedule
from optkit.engine.admission import check_blocks, check_request
from optkit.engine.execution import execute, said
from optkit.engine.following import Followed
from optkit.engine.memory import Memory
from optkit.engine.request import Event, FinishReason, PromptFacts, Request, TokenLogprob
from optkit.engine.rows import idle_row, row_of, score_prompt, wants_scores
from optkit.engine.sampler import Sampler, finite_rows, likeliest_tokens
from optkit.engine.sequence import Group, Sequence
from optkit.engine.speculation import Drafter, draft
from optkit.engine.stats import Stats
from optkit.engine.structure import Structures
from optkit.errors import OptkitError, RequestError
from optkit.steps import Row

__all__ = ["Engine"]

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
NOT_FINITE = "the model gave NaN or infinite logits"


class Engine(Followed):
    """Drives one session with one batcher, in the caller's thread. Token ids in, token ids out.

    ```python
    engine = Engine(session, batcher, end_tokens=(tokenizer.eos_token_id,))
    for event in engine.stream(Request(prompt, SamplingParams(max_tokens=64))):
        print(tokenizer.decode(event.token), end="")
    ```

    A step is a transaction. When `execute` raises, its rows are run again in halves, so that only the request that
    cannot be computed fails; the same for rows whose logits are not finite.

    Args:
        session: the open runtime. The engine does not close it.
        batcher: decides what each step holds.
        end_tokens: token ids that end a sequence, unless its request ignores them.
        structures: compiles what requests ask their output to be; without it such requests are refused.
        drafter: guesses tokens for the session to check. It changes the speed and never the output.
        clock: seconds, for the batcher; tests pass their own.
    """

    def __init__(
        self,
        session: TokenSession,
        batcher: Batcher,
        *,
        end_tokens: Collection[int] = (),
        structures: Structures | None = None,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session, self._batcher, self._clock = session, batcher, clock
        self._end_tokens = frozenset(end_tokens)
        self._structures = structures
        self._drafter = drafter
        self._memory = Memory(session, shares_prefixes=batcher.shares_prefixes)
        self._sampler = Sampler(session.caps.vocab_size, self._end_tokens)
        self._seats = min(batcher.max_sequences, session.caps.max_batch_size)
        self._groups: dict[int, Group] = {}
        self._sequences: dict[int, Sequence] = {}
        self._waiting: Any = SortedKeyList(key=_place)
        self._running: Any = SortedKeyList(key=_place)
        self._ended: list[Sequence] = []  # in a batch that is a rectangle: they keep their row until all have ended
        self._deadlines: Any = SortedList()
        self._events: list[Event] = []
        self._ids, self._sequence_ids = count(), count()
        self._stats = Stats(blocks=session.caps.blocks)
        self.wait: float | None = None
        """Seconds after which `step` should be called again, when the batcher waits for company; None: no such time."""

    # --- what callers do

    @property
    def busy(self) -> bool:
        """Whether any request is alive, or an event was not fetched yet."""
        return bool(self._groups or self._events)

    @property
    def stats(self) -> Stats:
        """Counters; the last four fields are as things stand."""
        self._stats.waiting, self._stats.running = len(self._waiting), len(self._running)
        self._stats.used_blocks = self._memory.pool.used
        return self._stats

    def add(self, request: Request) -> int:
        """Accept a request and return its id.

        Raises:
            RequestError: it could never be served: too long, empty, unknown tokens, too many samples, a structure that
                does not compile.
        """
        group = self._admissible(request)
        self._groups[group.id] = group
        self._sequences.update((sequence.id, sequence) for sequence in group.live)
        self._waiting.add(group)
        if group.deadline is not None:
            self._deadlines.add((group.deadline, group.id))
        self._stats.requests += 1
        return group.id

    def cancel(self, request: int) -> None:
        """End a request; the event that says so comes with the next step. One that has ended already is left alone."""
        if request in self._groups:
            self._end(self._groups[request], "cancelled")

    def stop(self, request: int, sample: int) -> None:
        """End one sample without an event, for a reader who saw a stop string. Others of the request go on."""
        group = self._groups.get(request)
        for sequence in [] if group is None else list(group.live):
            if sequence.sample == sample:
                self._finish(sequence, "stop")

    def step(self) -> list[Event]:
        """Run one step, if the batcher wants one, and return what happened since the last call."""
        now, self.wait = self._clock(), None
        while self._deadlines and self._deadlines[0][0] <= now:
            self._end(self._groups[self._deadlines[0][1]], "deadline")
        self._clear_ended()
        if self._groups:
            self._guess()
            plan = self._batcher.plan(self._waiting, self._running, self._memory, now)
            if isinstance(plan, Schedule):
                self._run(plan)
            elif plan.seconds is not None:
                self.wait = min(plan.seconds, self._deadlines[0][0] - now if self._deadlines else plan.seconds)
            elif not self._events:
                kind = type(self._batcher).__name__
                raise OptkitError(f"{kind} waits for ever with {len(self._waiting)} requests waiting")
        self._clear_ended()
        if not self._groups:
            self.check()
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Raise AssertionError if the KV cache and the requests alive do not add up."""
        self._memory.check(self._groups.values(), self._ended)
        queued = {group.id for group in (*self._waiting, *self._running)}
        if queued != self._groups.keys() or len(self._waiting) + len(self._running) != len(queued):
            raise AssertionError(f"queues hold {sorted(queued)}, alive are {sorted(self._groups)}")

    # --- admission

    def _admissible(self, request: Request) -> Group:
        caps, params = self._session.caps, request.params
        check_request(request, caps, self._seats)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        ids = (next(self._sequence_ids) for _ in range(params.samples))
        group = Group(next(self._ids), request, ids, seed, self._clock())
        check_blocks(group, caps)
        if params.structure is not None:
            if self._structures is None:
                raise RequestError("structured output needs the model's tokenizer, and this engine has none")
            self._structures.matcher(params.structure)  # it compiles now or never
        group.key = self._batcher.queue_key(group)
        return group

    # --- one step

    def _guess(self) -> None:
        if self._drafter is None:
            return
        try:
            draft(self._drafter, self._running)
        except Exception as error:
            log.warning("no tokens are guessed from here on: %s", said(error))
            self._drafter = None

    def _run(self, plan: Schedule) -> None:
        for preemption in plan.preemptions:
            self._preempt(self._groups[preemption.request], preemption.mode)
        rows = []
        width = max((share.tokens for share in plan.shares), default=0) if self._batcher.pads_batches else 0
        for share in plan.shares:
            sequence = self._sequences.get(share.sequence)
            if sequence is None:  # another sample of its request failed a moment ago
                continue
            try:
                rows.append(self._reserve(sequence, share.tokens, max(0, width - share.tokens)))
            except Exception as error:
                self._fail(sequence, said(error))
        # The blocks of what failed meanwhile may be others' by now.
        rows = [row for row in rows if row.sequence in self._sequences]
        if rows:
            self._stats.steps += 1
            results, errors = execute(self._session, (*rows, *map(idle_row, self._ended)))
            for identity, reason in errors.items():
                self._fail(self._sequences.get(identity), reason)
            self._commit([row for row in rows if row.sequence in results], results)
            for row in rows:
                if row.padding and row.sequence in self._sequences:
                    self._memory.trim(self._sequences[row.sequence])

    def _preempt(self, group: Group, mode: str) -> None:
        self._running.remove(group)
        group.running = False
        if mode == "swap" and self._memory.swap_out(group):
            self._stats.swapped += 1
        else:
            self._memory.evict(group)
            self._stats.recomputed += 1
        self._waiting.add(group)

    def _reserve(self, sequence: Sequence, count: int, padding: int) -> Row:
        group = sequence.group
        if not group.running:
            self._begin(group)
        self._memory.grow(sequence, count + padding)
        row = row_of(sequence, count)
        if padding:
            row = row._replace(tokens=row.tokens + row.tokens[-1:] * padding, padding=padding)
        return row

    def _begin(self, group: Group) -> None:
        self._waiting.remove(group)
        group.running = True
        self._running.add(group)
        self._memory.begin(group)
        if group.live[0].handle >= 0:
            return
        params, leader = group.request.params, group.live[0]
        group.cached = leader.computed
        self._stats.cached_tokens += leader.computed
        self._stats.looked_up_tokens += group.prompt_tokens if self._batcher.shares_prefixes else 0
        for sequence in group.live:
            if params.structure is not None and self._structures is not None:
                sequence.matcher = self._structures.matcher(params.structure)
            sequence.handle = self._sampler.open(
                params, group.request.prompt, seed=group.seed, sample=sequence.sample, matcher=sequence.matcher
            )

    def _commit(self, rows: list[Row], results: dict[int, Floats]) -> None:
        """Advance what was computed, and give every sequence whose turn it is its next tokens."""
        ready: list[tuple[Sequence, int]] = []
        parts: list[Floats] = []
        for row in rows:
            sequence = self._sequences.get(row.sequence)
            if sequence is None:
                continue
            logits, group = results[row.sequence], sequence.group
            new = len(row.tokens) - row.padding
            end = row.computed + new
            target = sequence.target
            if row.computed < group.prompt_tokens:
                self._stats.prompt_tokens += min(end, group.prompt_tokens) - row.computed
            if end < target or not len(logits):
                self._arrive(sequence, end)
                if wants_scores(group) and len(logits) and not score_prompt(group, row, logits):
                    self._fail(sequence, NOT_FINITE)
                continue
            if wants_scores(group):
                if not score_prompt(group, row, logits):
                    self._fail(sequence, NOT_FINITE)
                    continue
                logits, new = logits[-1:], 1
            elif row.logits == "last":
                new = 1
            self._arrive(sequence, target)
            for sample in group.live if end == group.prompt_tokens and not sequence.output else (sequence,):
                ready.append((sample, new))
                parts.append(logits)
        if not ready:
            return
        stacked = parts[0] if len(parts) == 1 else np.concatenate(parts)
        likeliest = likeliest_tokens(stacked)
        finite = finite_rows(stacked, likeliest)
        if not all(finite):
            ready, stacked = self._without_infinite(ready, stacked, finite)
            likeliest = likeliest_tokens(stacked)
        if ready:
            self._append(ready, stacked, likeliest)

    def _arrive(self, sequence: Sequence, computed: int) -> None:
        self._memory.advance(sequence, computed)
        if not sequence.group.forked and computed == sequence.group.prompt_tokens:
            self._memory.trim(sequence)
            self._memory.fork(sequence.group)

    def _append(self, ready: list[tuple[Sequence, int]], logits: Floats, likeliest: list[int]) -> None:
        handles = [sequence.handle for sequence, new in ready for _ in range(new)]
        positions = [len(sequence.tokens) + place for sequence, new in ready for place in range(new)]
        sampled = self._sampler.sample(logits, handles, positions, likeliest)
        place, taken = 0, []
        for sequence, new in ready:
            agreed = 1
            while agreed < new and sequence.draft[agreed - 1] == sampled.tokens[place + agreed - 1]:
                agreed += 1
            self._stats.drafted += new - 1
            self._stats.accepted += agreed - 1
            taken.append(range(place, place + agreed))
            place += new
        chosen = [place for places in taken for place in places]
        self._sampler.accept([handles[i] for i in chosen], [sampled.tokens[i] for i in chosen])
        for (sequence, _), places in zip(ready, taken, strict=True):
            sequence.draft = ()
            if sequence.matcher is not None and sequence.matcher.error:
                self._fail(sequence, sequence.matcher.error)
            for place in places:
                if sequence.finished is not None:
                    break
                self._emit(sequence, sampled.tokens[place], sampled.logprobs[place])
            if len(places) > 1 and sequence.finished is None:
                # The guesses that were right are computed, the last token is not.
                self._memory.advance(sequence, len(sequence.tokens) - 1)

    def _emit(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        group = sequence.group
        sequence.tokens.append(token)
        self._stats.output_tokens += 1
        params = group.request.params
        reason: FinishReason | None = "length" if len(sequence.tokens) >= group.max_total else None
        if (token in self._end_tokens and not params.ignore_eos) or token in params.stop_token_ids:
            reason = "stop"
        if sequence.matcher is not None and sequence.matcher.finished:
            reason = "stop"
        first = None
        if not group.told:
            group.told = True
            scores = tuple(group.prompt_logprobs) if group.scored else None
            first = PromptFacts(group.prompt_tokens, group.cached, scores)
        if reason is not None:
            self._finish(sequence, reason)
        self._events.append(Event(group.id, sequence.sample, token, reason, not group.live, logprob, first))

    # --- ends

    def _clear_ended(self) -> None:
        """Once nothing of a rectangle runs any more, its rows are gone."""
        if self._ended and not self._running:
            while self._ended:
                self._memory.release(self._ended.pop())

    def _without_infinite(
        self, ready: list[tuple[Sequence, int]], logits: Floats, finite: list[bool]
    ) -> tuple[list[tuple[Sequence, int]], Floats]:
        places = np.cumsum([0, *(new for _, new in ready)])
        for (sequence, _), start, end in zip(ready, places, places[1:], strict=False):
            if not all(finite[start:end]):
                self._fail(self._sequences.get(sequence.id), NOT_FINITE)
        kept = [sequence.id in self._sequences for sequence, _ in ready]
        rows = np.repeat(kept, [new for _, new in ready])
        return [one for one, keep in zip(ready, kept, strict=True) if keep], logits[rows]

    def _fail(self, sequence: Sequence | None, error: str) -> None:
        if sequence is not None and sequence.finished is None:  # else its request has ended already
            self._end(sequence.group, "error", error)

    def _end(self, group: Group, reason: FinishReason, error: str = "") -> None:
        for sequence in list(group.live):
            self._finish(sequence, reason)
            self._events.append(
                Event(group.id, sequence.sample, None, reason, last=not group.live, prompt=None, error=error)
            )

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        group = sequence.group
        sequence.finished = reason
        if group.saved is not None:
            del group.saved.places[sequence.id]
        elif self._batcher.pads_batches and sequence.computed:
            self._ended.append(sequence)
        else:
            self._memory.release(sequence)
        group.live.remove(sequence)
        del self._sequences[sequence.id]
        if sequence.handle >= 0:
            self._sampler.close(sequence.handle)
        if self._drafter is not None:
            self._drafter.forget(sequence.id)
        if not group.live:
            (self._running if group.running else self._waiting).remove(group)
            if group.deadline is not None:
                self._deadlines.discard((group.deadline, group.id))
            del self._groups[group.id]


def _place(group: Group) -> tuple[tuple[float, ...], int]:
    return group.key, group.id
