"""The engine under random use: requests come, run, share, are evicted, fail and are cancelled in any order.

Then the same with the engine broken on purpose, five times: each break must be found.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import Field

from optkit.batching import Batcher, MemoryView, Preemption, RequestView, Schedule, Wait
from optkit.engine import Engine, Event, Request, SamplingParams, memory
from optkit.engine.blocks import BlockPool
from optkit.engine.memory import Memory
from optkit.engine.sequence import Group
from optkit.errors import RequestError
from optkit.steps import Row
from optkit.testing import ScriptedSession
from optkit_batching.continuous import Continuous
from optkit_batching.static import Static

BLOCK, BLOCKS, SEATS = 2, 12, 4
END = 1
# Two tokens only: prompts begin alike all the time.
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)


def alone(request: Request) -> dict[int, tuple[int, ...]]:
    """What each sample of a request gives when nothing else runs."""
    return _alone(request.prompt, request.params.model_dump_json())


@cache
def _alone(prompt: tuple[int, ...], params: str) -> dict[int, tuple[int, ...]]:
    plain = Request(prompt, SamplingParams.model_validate_json(params))
    session = ScriptedSession(64, BLOCK, vocab_size=2, max_batch_size=SEATS, max_length=24)
    engine = Engine(session, Static(max_batch_size=SEATS), end_tokens=(END,))
    output: dict[int, list[int]] = {}
    for event in engine.stream(plain):
        output.setdefault(event.sample, []).append(event.token)
    return {sample: tuple(tokens) for sample, tokens in output.items()}


class Meddling(Batcher):
    """Continuous batching, with evictions that the test asks for instead of the next plan."""

    inner: Continuous
    evict: list[Preemption] = Field(default_factory=list)
    """Wanted."""
    evicted: list[Preemption] = Field(default_factory=list)
    """Done."""

    @property
    def max_sequences(self) -> int:
        return self.inner.max_sequences

    @property
    def shares_prefixes(self) -> bool:
        return self.inner.shares_prefixes

    def queue_key(self, request: RequestView) -> tuple[float, ...]:
        return self.inner.queue_key(request)

    def plan(
        self, waiting: Collection[RequestView], running: Collection[RequestView], memory: MemoryView, now: float
    ) -> Schedule | Wait:
        wanted = {one.request: one for one in self.evict}
        self.evict.clear()
        here = tuple(wanted[request.id] for request in running if request.id in wanted)
        self.evicted.extend(here)
        return Schedule((), here) if here else self.inner.plan(waiting, running, memory, now)


class EngineMachine(RuleBasedStateMachine):
    """What can happen to an engine, and what must hold after each of it."""

    @initialize(
        order=st.sampled_from(["fcfs", "priority", "shortest_prompt"]),
        admission=st.sampled_from(["reserve_full", "reserve_prompt", "watermark", "none"]),
        preemption=st.sampled_from(["recompute", "swap"]),
        prefix_cache=st.booleans(),
        budget=st.integers(SEATS, 12),
        mixed=st.booleans(),
    )
    def start(self, budget: int, mixed: bool, **options: Any) -> None:
        inner = Continuous(max_batch_size=SEATS, max_step_tokens=budget, watermark=0.2, **options)
        self.batcher = Meddling(inner=inner)
        self.faulty: set[int] = set()
        self.now = 0.0
        self.session = ScriptedSession(
            BLOCKS, BLOCK, max_length=24, max_batch_size=SEATS, vocab_size=2, mixed=mixed, fault=self.fault
        )
        self.engine = Engine(self.session, self.batcher, end_tokens=(END,), clock=lambda: self.now)
        self.requests: dict[int, Request] = {}
        self.output: dict[int, dict[int, list[int]]] = {}
        self.ended: dict[int, str] = {}

    def fault(self, row: Row) -> Exception | None:
        return RuntimeError("scripted") if row.sequence in self.faulty else None

    # --- what can happen

    @rule(
        prompt=tokens,
        params=st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 12),
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 1),
            ignore_eos=st.sampled_from([True, True, False]),
            n=st.sampled_from([1, 1, 2, 3]),
        ),
        priority=st.integers(-2, 2),
        salt=st.sampled_from(["", "another tenant"]),
        timeout=st.sampled_from([None, None, 3.0]),
    )
    def add(self, **fields: Any) -> None:
        request = Request(**fields)
        try:
            self.requests[self.engine.add(request)] = request
        except RequestError as error:
            if "blocks" not in str(error):
                raise

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), longer=tokens, salt=st.sampled_from(["", "another tenant"]))
    def add_with_a_known_prefix(self, data: st.DataObject, longer: tuple[int, ...], salt: str) -> None:
        known = data.draw(st.sampled_from(list(self.requests.values())))
        prompt = (*known.prompt, *longer)[:12]
        self.add(prompt=prompt, params=SamplingParams(max_tokens=3), priority=0, salt=salt, timeout=None)

    def step(self) -> None:
        self.now += 1
        for event in self.engine.step():
            self.take(event)

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from(self.alive())))

    @precondition(lambda self: len(self.engine._running))
    @rule(data=st.data(), mode=st.sampled_from(["recompute", "swap"]))
    def preempt(self, data: st.DataObject, mode: Any) -> None:
        running = [group.id for group in self.engine._running]
        self.batcher.evict.append(Preemption(data.draw(st.sampled_from(running)), mode))
        self.step()

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """A reader has seen a stop string in one sample."""
        request = data.draw(st.sampled_from(self.alive()))
        sample = data.draw(st.integers(0, self.requests[request].params.n - 1))
        self.engine.stop(request, sample)
        if request not in self.engine._groups:
            self.ended[request] = "stop"

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def fail_a_step(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.alive()))
        self.faulty = {one.id for one in self.engine._groups[request].live} if request in self.engine._groups else set()
        self.step()
        self.faulty = set()

    # --- what must hold

    def alive(self) -> list[int]:
        return [request for request in self.requests if request not in self.ended and request in self.engine._groups]

    def take(self, event: Event) -> None:
        request = self.requests[event.request]
        assert self.ended.get(event.request) in (None, "stop"), "an event after the last one"
        if event.token is not None:
            got = self.output.setdefault(event.request, {}).setdefault(event.sample, [])
            got.append(event.token)
            expected = alone(request)[event.sample]
            assert tuple(got) == expected[: len(got)], "not what the request gives alone"
            if event.finished:
                assert tuple(got) == expected, "ended too early"
        if event.last:
            assert event.request not in self.ended or self.ended[event.request] == "stop"
            self.ended[event.request] = event.finished or ""
            if event.finished == "error":
                assert "scripted" in event.error

    @invariant()
    def blocks_and_owners_add_up(self) -> None:
        self.engine.check()
        pool = self.engine._memory.pool
        assert pool.free + pool.used == pool.blocks
        if not self.engine._groups:
            assert pool.used == 0

    @invariant()
    def tenants_share_nothing(self) -> None:
        salts: dict[int, str] = {}
        for group in self.engine._groups.values():
            for block in group.blocks():
                assert salts.setdefault(block, group.request.salt) == group.request.salt, "a block of two tenants"

    @invariant()
    def an_evicted_request_holds_nothing(self) -> None:
        for group in self.engine._waiting:
            assert not group.blocks(), "half a group was evicted"

    @invariant()
    def no_eviction_under_full_reservation(self) -> None:
        if self.batcher.inner.admission == "reserve_full":
            assert self.engine.stats.recomputed + self.engine.stats.swapped == len(self.batcher.evicted)

    def teardown(self) -> None:
        if not hasattr(self, "engine") or sys.exc_info()[0] is not None:  # what failed before is what to report
            return
        for _ in range(2000):
            if not self.engine.busy:
                break
            self.step()
        assert not self.engine.busy, "requests that never end"
        lost = [request for request in self.requests if request not in self.ended]
        assert not lost, "requests without an end"
        assert self.engine._memory.pool.used == 0
        self.engine.check()


EXAMPLES = settings(stateful_step_count=60, suppress_health_check=list(HealthCheck))


def test_nothing_breaks_the_engine():
    """200 examples; the profile `nightly` (`make test-nightly`) runs 2,000."""
    nightly = settings.get_current_profile_name() == "nightly"
    run_state_machine_as_test(EngineMachine, settings=settings(EXAMPLES, max_examples=2_000 if nightly else 200))


# --- the tests bite


def skip_a_free(patch: pytest.MonkeyPatch) -> None:
    release = BlockPool.release
    patch.setattr(BlockPool, "release", lambda pool, blocks: release(pool, blocks[1:]))


def share_across_salts(patch: pytest.MonkeyPatch) -> None:
    extend = memory.extend_keys
    patch.setattr(memory, "extend_keys", lambda keys, tokens, size, salt: extend(keys, tokens, size, ""))


def evict_half_a_group(patch: pytest.MonkeyPatch) -> None:
    def evict(self: Memory, group: Group) -> None:
        for sequence in group.live[: (len(group.live) + 1) // 2]:
            self.release(sequence)
        group.forked = group.request.params.samples == 1

    patch.setattr(Memory, "evict", evict)


def lose_a_request(patch: pytest.MonkeyPatch) -> None:
    def preempt(self: Engine, group: Group, mode: str) -> None:
        self._running.remove(group)
        self._memory.evict(group)
        group.running = False

    patch.setattr(Engine, "_preempt", preempt)


def double_a_token(patch: pytest.MonkeyPatch) -> None:
    append = Engine._append

    def twice(self: Engine, ready: Any, *found: Any) -> None:
        append(self, ready, *found)
        for sequence, _ in ready[:1]:
            if sequence.finished is None and sequence.output == 3:
                sequence.tokens.append(sequence.tokens[-1])

    patch.setattr(Engine, "_append", twice)


@pytest.mark.parametrize(
    ("mutation", "found"),
    [
        (skip_a_free, "owners are"),
        (share_across_salts, "a block of two tenants"),
        (evict_half_a_group, "half a group was evicted|blocks are owned"),
        (lose_a_request, "queues hold"),
        (double_a_token, "not what the request gives alone"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_broken_engine_is_found_out(mutation, found, monkeypatch):
    mutation(monkeypatch)
    quick = settings(EXAMPLES, max_examples=300, phases=[Phase.generate], database=None, derandomize=True)
    with pytest.raises((AssertionError, BaseExceptionGroup)) as caught:
        run_state_machine_as_test(EngineMachine, settings=quick)
    errors = getattr(caught.value, "exceptions", [caught.value])
    assert any(re.search(found, str(error)) for error in errors), errors
