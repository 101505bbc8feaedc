"""Bucketed batching: who is batched with whom, and that nobody is left behind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.batching import Schedule, Share, Wait
from optkit.testing import FakeMemory, FakeRequest, FakeSequence, decoding
from optkit_batching.bucketed import Bucketed


def queue(*lengths: int, max_tokens: int = 0) -> list[FakeRequest]:
    requests = [FakeRequest(id, length, max_tokens) for id, length in enumerate(lengths)]
    for request in requests:
        request.sequences = [FakeSequence(request.prompt_tokens, id=request.id)]
    return requests


def lengths_of(batcher, waiting, memory=None):
    plan = batcher.plan(waiting, [], memory or FakeMemory(), 0.0)
    assert isinstance(plan, Schedule)
    return [share.tokens for share in plan.shares]


def test_the_oldest_is_batched_with_its_neighbours_in_length():
    assert lengths_of(Bucketed(max_batch_size=3), queue(50, 9, 100, 48, 10, 55, 300)) == [50, 48, 55]


def test_a_batch_ends_where_padding_would_be_more_than_its_share():
    # 8 + 10 of 20: one tenth is padding. With 6 it would be 6 of 30, a fifth.
    assert lengths_of(Bucketed(max_padding=0.1), queue(10, 8, 6, 30)) == [10, 8]
    assert lengths_of(Bucketed(max_padding=0.2), queue(10, 8, 6, 30)) == [10, 8, 6]
    assert lengths_of(Bucketed(max_padding=0.0), queue(10, 8, 10, 30)) == [10, 10]


def test_a_batch_holds_no_more_tokens_than_it_may_but_always_the_oldest():
    assert lengths_of(Bucketed(max_batch_tokens=36), queue(10, 11, 12, 12)) == [10, 11, 12]
    assert lengths_of(Bucketed(max_batch_tokens=36), queue(100, 90)) == [100]


def test_of_equal_neighbours_the_older_comes_first():
    plan = Bucketed(max_batch_size=3).plan(queue(10, 10, 10, 10), [], FakeMemory(), 0.0)
    assert [share.sequence for share in plan.shares] == [0, 1, 2]


def test_generation_takes_what_memory_holds_to_the_end_and_runs_to_it():
    waiting = queue(8, 8, 8, max_tokens=8)  # 16 tokens each: 4 blocks
    assert lengths_of(Bucketed(), waiting, FakeMemory(free=11)) == [8, 8]
    assert lengths_of(Bucketed(), waiting, FakeMemory(rows=1)) == [8]
    running = decoding(1, samples=2)
    plan = Bucketed().plan(waiting, [running], FakeMemory(), 0.0)
    assert plan == Schedule(tuple(Share(sequence.id, 1) for sequence in running.sequences))
    assert Bucketed().plan([], [], FakeMemory(), 0.0) == Wait(None)


@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=80),
    st.integers(1, 9),
    st.floats(0, 0.9, allow_nan=False),
    st.none() | st.integers(1, 2000),
)
def test_every_batch_keeps_its_budgets_and_everybody_is_served_once(lengths, size, padding, tokens):
    batcher = Bucketed(max_batch_size=size, max_padding=padding, max_batch_tokens=tokens)
    waiting, served = queue(*lengths), []
    while waiting:
        plan = batcher.plan(waiting, [], FakeMemory(), 0.0)
        batch = {share.sequence: share.tokens for share in plan.shares}
        assert len(batch) == len(plan.shares) <= size
        assert waiting[0].id in batch, "the oldest is always next"
        area = len(batch) * max(batch.values())
        assert area - sum(batch.values()) <= padding * area + 1e-6
        assert tokens is None or area <= tokens or len(batch) == 1
        served += batch
        waiting = [request for request in waiting if request.id not in batch]
    assert sorted(served) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.floats(0, 0.9), st.integers(1, 400))
def test_it_stops_looking_only_where_nobody_fits_any_more(lengths, padding, tokens):
    batcher = Bucketed(max_batch_size=64, max_padding=padding, max_batch_tokens=tokens)
    batch = []
    for length in sorted(lengths, key=lambda length: abs(length - lengths[0])):
        area = max(length, *batch, 0) * (len(batch) + 1)
        if not batch or (sum(batch) + length >= (1 - padding) * area and area <= tokens):
            batch.append(length)
    assert lengths_of(batcher, queue(*lengths)) == batch


def test_a_long_queue_is_not_looked_through_to_its_end():
    class Counted(list):
        seen = 0

        def __iter__(self):
            for request in super().__iter__():
                self.seen += 1
                yield request

    waiting = Counted(queue(*range(1, 3001)))
    Bucketed(max_batch_size=2).plan(waiting, [], FakeMemory(), 0.0)
    assert waiting.seen == 128


def test_its_options_are_checked():
    assert (Bucketed(max_batch_size=3).max_sequences, Bucketed().shares_prefixes) == (3, False)
    for wrong in ({"max_padding": 1.0}, {"max_padding": -0.1}, {"max_batch_tokens": 0}, {"max_batch_size": 0}):
        with pytest.raises(ValidationError):
            Bucketed(**wrong)
