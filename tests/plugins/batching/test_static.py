"""Static batching, by asserts on plain data."""

from __future__ import annotations

from optkit.batching import MemoryView, SequenceView, Wait
from optkit.steps import Caps, Row, StepPlan
from optkit_batching.static import Static

SLOTS = Caps(kv="slot", block_size=64, blocks=4, max_batch_size=4, mixed=True, vocab_size=10)
PAGES = Caps(kv="paged", block_size=4, blocks=8, max_batch_size=4, mixed=True, vocab_size=10)


def sequence(id, prompt=3, computed=0, blocks=(), max_total=10):
    return SequenceView(id, tuple(range(prompt)), computed, max_total, blocks, arrived=0.0)


def test_fills_a_batch_in_order_of_arrival():
    plan = Static(max_batch_size=2).plan(
        [sequence(7), sequence(8), sequence(9)], [], MemoryView(SLOTS, (0, 1, 2, 3)), 0.0
    )
    assert plan == StepPlan((Row(7, (0, 1, 2), 0, (0,)), Row(8, (0, 1, 2), 0, (1,))))


def test_nothing_joins_a_running_batch():
    running = [sequence(1, prompt=5, computed=4, blocks=(2,))]
    plan = Static(max_batch_size=4).plan([sequence(2)], running, MemoryView(SLOTS, (0, 1, 3)), 0.0)
    assert plan == StepPlan((Row(1, (4,), 4, (2,)),))


def test_takes_blocks_for_the_whole_sequence_and_no_more_sequences_than_fit():
    plan = Static(max_batch_size=4).plan(
        [sequence(1), sequence(2), sequence(3)], [], MemoryView(PAGES, tuple(range(8))), 0.0
    )
    assert isinstance(plan, StepPlan)
    assert [row.blocks for row in plan.rows] == [(0, 1, 2), (3, 4, 5)]


def test_waits_when_there_is_nothing_to_do():
    assert Static().plan([], [], MemoryView(SLOTS, (0,)), 0.0) == Wait(None)
