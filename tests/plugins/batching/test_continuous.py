"""Continuous batching, plan by plan."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.batching import Preemption, Schedule, Wait
from optkit.testing import FakeMemory, FakeRequest, FakeSequence, decoding
from optkit_batching.continuous import Continuous


def planned(batcher, waiting=(), running=(), memory=None, now=0.0):
    """Tokens by request, and who is evicted."""
    plan = batcher.plan(list(waiting), list(running), memory or FakeMemory(), now)
    if isinstance(plan, Wait):
        return plan
    owner = {one.id: request.id for request in (*waiting, *running) for one in request.sequences}
    shares: dict[int, int] = {}
    for share in plan.shares:
        shares[owner[share.sequence]] = shares.get(owner[share.sequence], 0) + share.tokens
    return shares, [one.request for one in plan.preemptions]


def test_nothing_to_do_waits_for_an_arrival():
    assert planned(Continuous()) == Wait(None)


def test_a_prompt_is_computed_beside_running_answers_within_the_budget():
    batcher = Continuous(max_batch_size=4, max_step_tokens=10)
    shares, evicted = planned(batcher, [FakeRequest(3, prompt_tokens=30)], [decoding(1), decoding(2)])
    assert (shares, evicted) == ({1: 1, 2: 1, 3: 8}, [])


def test_a_prompt_under_way_goes_before_newcomers():
    batcher = Continuous(max_batch_size=4, max_step_tokens=10)
    under_way = FakeRequest(1, prompt_tokens=30, sequences=[FakeSequence(22, 8)])
    assert planned(batcher, [FakeRequest(2, prompt_tokens=5)], [under_way])[0] == {1: 10}


def test_a_session_that_cannot_mix_computes_prompts_first_and_then_answers():
    batcher, memory = Continuous(max_batch_size=4), FakeMemory(mixed=False)
    assert planned(batcher, [FakeRequest(2)], [decoding(1)], memory)[0] == {2: 8}
    assert planned(batcher, [], [decoding(1), decoding(2)], memory)[0] == {1: 1, 2: 1}


def test_a_session_that_cannot_mix_goes_on_with_answers_when_a_prompt_has_no_room():
    running = [decoding(1, computed=9), FakeRequest(2, prompt_tokens=30, sequences=[FakeSequence(22, 8)])]
    batcher, memory = Continuous(admission="none"), FakeMemory(free=1, mixed=False)
    assert planned(batcher, [], running, memory) == ({1: 1}, [2])


def test_seats_count_samples():
    batcher = Continuous(max_batch_size=4)
    waiting = [FakeRequest(2, samples=2), FakeRequest(3, samples=1)]
    assert planned(batcher, waiting, [decoding(1, samples=2)])[0] == {1: 2, 2: 8}
    assert planned(batcher, waiting, [decoding(1, samples=3)])[0] == {1: 3}, "the second may not overtake the first"


def test_a_cached_prefix_is_not_computed_again():
    assert planned(Continuous(), [FakeRequest(1, prompt_tokens=10, hits=8)])[0] == {1: 2}


def test_guesses_are_checked_while_there_is_budget_and_room():
    batcher = Continuous(max_batch_size=3, max_step_tokens=6)
    running = [decoding(1, drafts=4), decoding(2, drafts=4)]
    assert planned(batcher, [], running)[0] == {1: 5, 2: 1}
    full = FakeMemory(free=0)
    assert planned(batcher, [], [decoding(1, computed=9, drafts=4)], full) == ({1: 1}, []), "nobody goes for a guess"


# Blocks of 4. A request of 8 prompt and 8 output tokens can come to hold 4.
@pytest.mark.parametrize(
    ("admission", "free", "begins"),
    [
        ("reserve_full", 4 + 1, True),  # the running one holds 3 of its 4
        ("reserve_full", 4, False),
        ("reserve_prompt", 2, True),
        ("reserve_prompt", 1, False),
        ("watermark", 2 + 10, True),
        ("watermark", 2 + 9, False),
        ("none", 2, True),
        ("none", 1, False),
    ],
)
def test_admission(admission, free, begins):
    batcher = Continuous(admission=admission, watermark=0.1)
    shares, _ = planned(batcher, [FakeRequest(2)], [decoding(1, computed=9)], FakeMemory(free=free))
    assert (2 in shares) == begins


def test_without_reservation_the_first_chunk_is_enough():
    batcher = Continuous(admission="none", max_batch_size=1, max_step_tokens=4)
    assert planned(batcher, [FakeRequest(1, prompt_tokens=40)], [], FakeMemory(free=1))[0] == {1: 4}


def test_full_reservation_counts_what_others_may_still_want():
    batcher, running = Continuous(), [decoding(id, computed=9) for id in (1, 2, 3)]
    assert 4 not in planned(batcher, [FakeRequest(4)], running, FakeMemory(free=6))[0]
    assert 4 in planned(batcher, [FakeRequest(4)], running, FakeMemory(free=7))[0]


def test_whoever_is_alone_may_begin_under_every_policy():
    for admission in ("reserve_full", "reserve_prompt", "watermark", "none"):
        batcher = Continuous(admission=admission, watermark=0.9)
        assert planned(batcher, [FakeRequest(1)], [], FakeMemory(free=4))[0] == {1: 8}, admission


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_the_last_in_the_queue_goes_whole_when_blocks_run_out(mode):
    batcher = Continuous(admission="none", preemption=mode)
    running = [decoding(1, computed=8), decoding(2, computed=8, samples=2), decoding(3, computed=9)]
    plan = batcher.plan([], running, FakeMemory(free=2), 0.0)
    assert isinstance(plan, Schedule)
    assert plan.preemptions == (Preemption(3, mode),), "one of them is enough"
    assert [share.sequence for share in plan.shares] == [
        one.id for one in (*running[0].sequences, *running[1].sequences)
    ]


def test_an_evicted_request_gives_back_what_this_step_gave_it():
    batcher = Continuous(admission="none", max_batch_size=4, max_step_tokens=16)
    prompt = FakeRequest(1, prompt_tokens=20, sequences=[FakeSequence(12, 8)])
    later = decoding(2, computed=8)
    # The later one takes the only block first, and gives it back with its own two.
    assert planned(batcher, [], [prompt, later], FakeMemory(free=1)) == ({1: 12}, [2])


def test_who_asks_for_too_much_and_stands_last_goes_itself():
    running = [decoding(1, computed=9), decoding(2, computed=8)]
    assert planned(Continuous(admission="none"), [], running, FakeMemory(free=0)) == ({1: 1}, [2])


def test_nobody_begins_in_a_step_that_evicts():
    running = [decoding(1, computed=8), decoding(2, computed=12)]
    shares, evicted = planned(Continuous(admission="none"), [FakeRequest(3)], running, FakeMemory(free=0))
    assert (shares, evicted) == ({1: 1}, [2])


@pytest.mark.parametrize(("order", "first"), [("fcfs", "early"), ("priority", "urgent"), ("shortest_prompt", "short")])
def test_orders(order, first):
    batcher = Continuous(order=order, patience_s=10)
    requests = {
        "early": FakeRequest(1, prompt_tokens=900, priority=0, arrived=0),
        "urgent": FakeRequest(2, prompt_tokens=900, priority=-1, arrived=5),
        "short": FakeRequest(3, prompt_tokens=10, priority=0, arrived=5),
    }
    assert min(requests, key=lambda name: batcher.queue_key(requests[name])) == first


@given(
    order=st.sampled_from(["fcfs", "priority", "shortest_prompt"]),
    old=st.builds(FakeRequest, st.just(1), st.integers(1, 4000), priority=st.integers(-100, 100)),
    new=st.builds(FakeRequest, st.just(2), st.integers(1, 4000), priority=st.integers(-100, 100)),
)
def test_nobody_overtakes_a_request_that_has_waited_long_enough(order, old, new):
    batcher = Continuous(order=order, patience_s=2)
    new.arrived = old.arrived + 2 * 200.1
    assert batcher.queue_key(old) < batcher.queue_key(new)


def test_a_budget_below_the_batch_is_refused():
    with pytest.raises(ValidationError, match="raise max_step_tokens from 8"):
        Continuous(max_batch_size=16, max_step_tokens=8)
