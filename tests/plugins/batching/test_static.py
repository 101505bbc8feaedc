"""Static batching, plan by plan."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from optkit.batching import Schedule, Share, Wait
from optkit.testing import FakeMemory, FakeRequest, FakeSequence, decoding
from optkit_batching.static import Static


def planned(batcher, waiting, running=(), memory=None):
    plan = batcher.plan(list(waiting), list(running), memory or FakeMemory(), 0.0)
    return plan if isinstance(plan, Wait) else {share.sequence: share.tokens for share in plan.shares}


def new(id: int, **fields: int) -> FakeRequest:
    request = FakeRequest(id, **fields)
    request.sequences = [FakeSequence(request.prompt_tokens, id=id)]
    return request


def test_a_batch_starts_with_the_whole_prompts_of_the_first_that_wait():
    assert planned(Static(max_batch_size=2), [new(7), new(8, prompt_tokens=3), new(9)]) == {7: 8, 8: 3}


def test_nothing_joins_a_batch_on_its_way():
    running = decoding(1, computed=4)
    plan = Static(max_batch_size=4).plan([new(2)], [running], FakeMemory(), 0.0)
    assert plan == Schedule((Share(running.sequences[0].id, 1),))


def test_every_sample_and_every_guess_goes_on():
    running = decoding(1, samples=2, drafts=3)
    assert planned(Static(max_batch_size=4), [], [running]) == {one.id: 4 for one in running.sequences}


def test_a_batch_holds_what_memory_and_rows_can_hold_to_the_end():
    requests = [new(id) for id in range(4)]  # 16 tokens each: 4 blocks
    assert list(planned(Static(max_batch_size=4), requests, memory=FakeMemory(free=11))) == [0, 1]
    assert list(planned(Static(max_batch_size=4), requests, memory=FakeMemory(rows=3))) == [0, 1, 2]
    assert list(planned(Static(max_batch_size=4), [new(1, samples=3), new(2, samples=2), new(3)])) == [1]


def test_waits_when_there_is_nothing_to_do():
    assert planned(Static(), []) == Wait(None)


def test_the_batch_size_is_its_number_of_sequences():
    assert (Static(max_batch_size=3).max_sequences, Static(max_batch_size=3).shares_prefixes) == (3, False)
    with pytest.raises(ValidationError):
        Static(max_batch_size=0)
