"""Dynamic batching, plan by plan."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.batching import Schedule, Share, Wait
from optkit.testing import FakeMemory, FakeRequest, FakeSequence, decoding
from optkit_batching.dynamic import Dynamic


def new(id: int, arrived: float = 0.0, **fields: int) -> FakeRequest:
    request = FakeRequest(id, arrived=arrived, **fields)
    request.sequences = [FakeSequence(request.prompt_tokens, id=id)]
    return request


def planned(batcher, waiting, now, running=(), memory=None):
    plan = batcher.plan(list(waiting), list(running), memory or FakeMemory(), now)
    return plan if isinstance(plan, Wait) else [share.sequence for share in plan.shares]


def test_a_full_batch_starts_at_once():
    batcher = Dynamic(max_batch_size=2, max_queue_delay_ms=50)
    assert planned(batcher, [new(1), new(2), new(3)], 0.0) == [1, 2]
    assert planned(batcher, [new(1), new(2)], 0.0) == [1, 2]


def test_a_batch_that_is_not_full_waits_for_what_is_left_of_the_oldest_ones_delay():
    batcher = Dynamic(max_batch_size=4, max_queue_delay_ms=50)
    waiting = [new(1, arrived=10.0), new(2, arrived=10.03)]
    assert planned(batcher, waiting, 10.03).seconds == pytest.approx(0.02)
    assert planned(batcher, waiting, 10.05) == [1, 2]
    assert planned(batcher, waiting, 99.0) == [1, 2]


def test_without_a_delay_it_runs_whatever_is_there():
    assert planned(Dynamic(max_queue_delay_ms=0), [new(1, arrived=5.0)], 5.0) == [1]
    assert planned(Dynamic(), [], 5.0) == Wait(None)


def test_who_cannot_join_by_waiting_is_not_waited_for():
    batcher = Dynamic(max_batch_size=8, max_queue_delay_ms=50)
    # 16 tokens each: 4 blocks. The second does not fit beside the first, however long it waits.
    assert planned(batcher, [new(1), new(2)], 0.0, memory=FakeMemory(free=7)) == [1]
    assert planned(batcher, [new(1, samples=3)], 0.0, memory=FakeMemory(rows=3)) == [1]


def test_a_batch_under_way_runs_to_its_end():
    running = decoding(1, samples=2, drafts=3)
    plan = Dynamic().plan([new(2)], [running], FakeMemory(), 0.0)
    assert plan == Schedule(tuple(Share(sequence.id, 4) for sequence in running.sequences))


@given(
    st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=30).map(sorted),
    st.integers(1, 8),
    st.floats(0, 100, allow_nan=False),
)
def test_nobody_waits_longer_than_the_delay_and_batches_keep_the_order(arrivals, size, delay):
    """A queue served at the moments that the batcher asks for; a batch takes no time."""
    batcher = Dynamic(max_batch_size=size, max_queue_delay_ms=delay)
    coming, queue, served, now = [new(id, at) for id, at in enumerate(arrivals)], [], [], 0.0
    while coming or queue:
        while coming and coming[0].arrived <= now:
            queue.append(coming.pop(0))
        plan = batcher.plan(queue, [], FakeMemory(free=10_000), now)
        if isinstance(plan, Schedule):
            batch, queue = queue[: len(plan.shares)], queue[len(plan.shares) :]
            assert [share.sequence for share in plan.shares] == [request.id for request in batch]
            assert len(batch) <= size
            assert all(now - request.arrived <= delay / 1e3 + 2e-6 for request in batch)
            served += batch
        else:
            ends = [coming[0].arrived] if coming else []
            now = min([*ends, now + plan.seconds] if plan.seconds is not None else ends)
    assert [request.id for request in served] == list(range(len(arrivals)))


def test_its_options_are_checked():
    assert (Dynamic(max_batch_size=3).max_sequences, Dynamic().shares_prefixes) == (3, False)
    for wrong in ({"max_batch_size": 0}, {"max_queue_delay_ms": -1.0}):
        with pytest.raises(ValidationError):
            Dynamic(**wrong)
