"""What a kernel is held against."""

from __future__ import annotations

import pytest

from optkit.bench.explaining import _row
from optkit.hardware import Peaks
from optkit.steps import KernelTime

PEAKS = Peaks(
    read_gb_per_s=10,
    copy_gb_per_s=10,
    fp32_gflops=100,
    bf16_gflops=None,
    int8_gops=400,
    unsupported={"bf16_gflops": "no kernel"},
    cores=2,
    torch="2",
)


def share(peaks=PEAKS, *, integer, read=0, operations=50_000_000_000):
    """Of the ceiling, for two calls that take a second together."""
    calls = [KernelTime("up", "product", 0.5, read // 2, operations // 2, integer) for _ in range(2)]
    return _row("up", "product", calls, 2.0, peaks).of_ceiling


def test_products_are_held_against_those_of_their_kind():
    assert share(integer=False) == pytest.approx(0.5)
    assert share(integer=True) == pytest.approx(0.125)
    assert share(integer=True, read=4_000_000_000) == pytest.approx(0.4)


def test_integers_have_no_ceiling_where_none_was_measured():
    unmeasured = PEAKS.model_copy(update={"int8_gops": None})
    assert share(unmeasured, integer=True, read=4_000_000_000) == 0
    assert share(unmeasured, integer=False) == pytest.approx(0.5)
