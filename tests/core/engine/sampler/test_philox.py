"""The generator is Random123's Philox4x32-10, and what is drawn from it is uniform."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.engine.sampler.philox import philox, uniform

# The known answers that come with Random123 (kat_vectors, philox4x32 10).
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([int(word, 16)], dtype=np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert philox(words(counter), words(key)) == words(answer)


def test_rows_do_not_touch_each_other():
    counters, keys, answers = zip(*KNOWN, strict=True)
    together = philox(
        tuple(np.concatenate(word) for word in zip(*map(words, counters), strict=True)),
        tuple(np.concatenate(word) for word in zip(*map(words, keys), strict=True)),
    )
    assert [tuple(column) for column in zip(*together, strict=True)] == [
        tuple(word[0] for word in words(answer)) for answer in answers
    ]


def test_uniform_numbers_fill_the_unit_interval_evenly():
    positions = np.arange(100_000, dtype=np.uint64)
    drawn = uniform(np.full_like(positions, 3), np.zeros_like(positions), positions)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # 99 degrees of freedom: beyond 148 once in a thousand seeds.
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 148


def test_seed_sample_and_position_each_change_the_number():
    rows = np.array([[7, 0, 5], [8, 0, 5], [7 + 2**32, 0, 5], [7, 1, 5], [7, 0, 6], [7, 0, 5 + 2**32]], dtype=np.uint64)
    drawn = uniform(*rows.T)
    assert len(set(drawn.tolist())) == len(rows)
