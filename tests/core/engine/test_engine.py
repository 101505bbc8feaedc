"""The engine on a scripted session: every batching gives what each request gets alone, and no block is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.backends import TokenSession
from optkit.engine import BlockPool, Engine, Request, SamplingParams
from optkit.errors import MachineError
from optkit.steps import Caps, KernelTime, StepPlan, StepResult
from optkit_batching.static import Static

VOCABULARY = 17


class ScriptedSession(TokenSession):
    """A model whose next token is a hash of the whole sequence, which it must have kept in its blocks itself."""

    def __init__(self, slots: int = 3, length: int = 40, fail_at: int | None = None) -> None:
        self.caps = Caps("slot", length, slots, slots, mixed=True, vocab_size=VOCABULARY)
        self.kept: dict[int, list[int]] = {}
        self.steps, self._fail_at = 0, fail_at

    def execute(self, plan: StepPlan) -> StepResult:
        self.steps += 1
        if self.steps == self._fail_at:
            raise RuntimeError("scripted failure")
        logits = []
        for row in plan.rows:
            (slot,) = row.blocks
            kept = [] if row.computed == 0 else self.kept[slot]
            assert len(kept) == row.computed, "the engine lost count of the KV cache"
            self.kept[slot] = [*kept, *row.tokens]
            one = np.zeros((1, VOCABULARY), dtype=np.float32)
            one[0, hash(tuple(self.kept[slot])) % VOCABULARY] = 1.0
            logits.append(one if row.logits == "last" else one[:0])
        return StepResult(tuple(logits))

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        return []

    def close(self) -> None:
        self.kept.clear()


def drain(engine: Engine) -> dict[int, list[int]]:
    output: dict[int, list[int]] = {}
    ended: list[int] = []
    while engine.busy:
        for event in engine.step():
            assert event.request not in ended, "a token after the end"
            output.setdefault(event.request, []).append(event.token)
            if event.finished:
                ended.append(event.request)
    return output


requests = st.lists(
    st.builds(
        Request,
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20).map(tuple),
        params=st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 20),
            temperature=st.sampled_from([0.0, 0.7]),
            seed=st.integers(0, 3),
            stop_token_ids=st.sampled_from([(), (3,)]),
            ignore_eos=st.booleans(),
        ),
    ),
    max_size=8,
)


@given(requests=requests, batch=st.integers(1, 3))
def test_batched_output_is_that_of_each_request_alone(requests, batch):
    alone = [drain_one(request) for request in requests]
    engine = Engine(ScriptedSession(), Static(max_batch_size=batch), eos=(5,))
    ids = [engine.add(request) for request in requests]
    output = drain(engine)
    assert [output[id] for id in ids] == alone
    assert not engine.busy


def drain_one(request: Request) -> list[int]:
    engine = Engine(ScriptedSession(slots=1), Static(), eos=(5,))
    return [event.token for event in engine.stream(request)]


def test_ends_at_eos_at_stop_tokens_and_at_the_length():
    def reasons(**params):
        engine = Engine(ScriptedSession(), Static(), eos=(5,))
        return [e.finished for e in engine.stream(Request((1, 2), SamplingParams(max_tokens=20, **params)))][-1]

    free = drain_one(Request((1, 2), SamplingParams(max_tokens=20, ignore_eos=True)))
    assert reasons(ignore_eos=True) == "length"
    assert reasons(ignore_eos=True, stop_token_ids=(free[3],)) == "stop"


def test_a_failed_step_never_happened():
    engine = Engine(ScriptedSession(fail_at=1), Static(max_batch_size=2))
    first, second = (engine.add(Request((n, n), SamplingParams(max_tokens=4))) for n in (1, 2))
    with pytest.raises(RuntimeError, match="scripted failure"):
        engine.step()
    output = drain(engine)
    assert list(output) == [first, second]
    assert [output[first], output[second]] == [drain_one(Request((n, n), SamplingParams(max_tokens=4))) for n in (1, 2)]


def test_what_can_never_fit_is_refused_with_the_figures():
    engine = Engine(ScriptedSession(length=10), Static())
    with pytest.raises(MachineError, match=r"a prompt of 8 tokens and 3 output tokens need 11 positions .* has 10"):
        engine.add(Request((1,) * 8, SamplingParams(max_tokens=3)))
    with pytest.raises(MachineError, match="empty"):
        engine.add(Request((), SamplingParams()))
    with pytest.raises(MachineError, match="outside 0 to 16"):
        engine.add(Request((17,), SamplingParams(max_tokens=1)))
    assert not engine.busy


def test_seed_and_position_alone_decide_a_draw():
    request = Request((1, 2, 3), SamplingParams(max_tokens=10, temperature=5.0, seed=7, ignore_eos=True))
    other = Request((4,), SamplingParams(max_tokens=10, temperature=5.0, seed=9, ignore_eos=True))
    engine = Engine(ScriptedSession(), Static(max_batch_size=2))
    ids = [engine.add(other), engine.add(request)]
    assert drain(engine)[ids[1]] == drain_one(request)


def test_the_pool_refuses_what_would_break_it():
    pool = BlockPool(ScriptedSession().caps)
    pool.take((0, 2))
    with pytest.raises(ValueError, match="not free"):
        pool.take((1, 2))
    with pytest.raises(ValueError, match="no owner"):
        pool.release((1,))
    assert pool.view().free == (1,)
    pool.release((0, 2))
    pool.check()
    assert pool.free == 3
