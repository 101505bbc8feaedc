"""From scripted times to ratios and verdicts, and every reason to withhold them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from optkit.bench import Comparison, Sample, Samples, Withheld, Workload, compare, compare_footprints
from optkit.builtin.speed import DecodeTokensPerSecond, Latency, PeakMemory, Size, TimePerOutputToken
from optkit.metrics import Footprint, Run

METRICS = {"decode": DecodeTokensPerSecond(), "latency": Latency()}
OUTPUT = (3, 1, 4, 1)


def timed(seconds, output=OUTPUT, prompt_tokens=3):
    """A run with `seconds` for each token."""
    return Run(prompt_tokens, tuple(seconds * (index + 1) for index in range(len(output))), tuple(output))


def scripted(blocks=8, again=True, noise=0.0, **seconds):
    """Samples in which each arm takes its own seconds per token in all runs, times the block's own slowness."""
    random = np.random.default_rng(0)
    arms = [*seconds, "slow (again)"] if again else [*seconds]
    samples = []
    for block in range(blocks):
        slowness = 1 + block  # far more than any arm's advantage: only pairing by blocks can see that
        for position, arm in enumerate(arms + arms[::-1]):
            own = seconds[arm.removesuffix(" (again)")] * slowness * math.exp(noise * random.normal())
            samples.append(Sample(block, position, arm, timed(own)))
    twin = ("slow", "slow (again)") if again else None
    return Samples(Workload(3, 4, blocks), tuple(arms), twin, tuple(samples))


def spoilt(samples, arm, run):
    """The same samples with the first run of `arm` replaced."""
    index = next(index for index, sample in enumerate(samples.samples) if sample.arm == arm)
    changed = [*samples.samples]
    changed[index] = replace(changed[index], run=run)
    return replace(samples, samples=tuple(changed))


def test_a_steady_advantage_is_found_through_a_drifting_machine():
    decode, latency = compare(scripted(slow=0.02, fast=0.01), METRICS, "slow")
    assert isinstance(decode, Comparison)
    assert (decode.metric, decode.arm, decode.unit, decode.verdict) == ("decode", "fast", "tok/s", "better")
    for bound in (decode.ratio.value, decode.ratio.low, decode.ratio.high):
        assert bound == pytest.approx(2)
    assert decode.noise is not None
    assert decode.noise.low == pytest.approx(1)
    # The median of 1, 2 ... 8 times slower lies between the fourth and the fifth block.
    assert decode.baseline == pytest.approx(1 / (0.02 * math.sqrt(4 * 5)))
    assert latency.ratio.value == pytest.approx(0.5)
    assert latency.verdict == "better"
    assert latency.value == pytest.approx(4 * 0.01 * math.sqrt(4 * 5))


def test_swapping_the_baseline_inverts_everything():
    samples = scripted(slow=0.02, fast=0.011, noise=0.05)
    [forth] = compare(samples, {"tpot": TimePerOutputToken()}, "slow")
    [back] = compare(samples, {"tpot": TimePerOutputToken()}, "fast")
    assert (forth.verdict, back.verdict) == ("better", "worse")
    assert back.ratio.value == pytest.approx(1 / forth.ratio.value)
    assert back.ratio.low == pytest.approx(1 / forth.ratio.high)
    assert (back.baseline, back.value) == pytest.approx((forth.value, forth.baseline))


def test_every_other_arm_is_judged_and_the_twin_is_not():
    found = compare(scripted(slow=0.02, fast=0.01, same=0.0201), METRICS, "slow")
    assert [(one.arm, one.metric) for one in found] == [
        ("fast", "decode"),
        ("fast", "latency"),
        ("same", "decode"),
        ("same", "latency"),
    ]
    assert [one.verdict for one in found] == ["better", "better", "equivalent", "equivalent"]


def test_a_gain_within_the_machine_s_noise_is_not_claimed():
    noisy = scripted(slow=0.0212, fast=0.02, noise=0.2)
    [found] = compare(noisy, {"latency": Latency()}, "slow", margin=0.01)
    assert found.verdict == "inconclusive"
    assert found.noise.high > found.noise.low


def test_without_a_twin_there_is_no_noise_floor():
    [found] = compare(scripted(slow=0.02, fast=0.01, again=False), {"latency": Latency()}, "slow")
    assert found.noise is None
    assert found.verdict == "better"


def test_few_blocks_conclude_nothing():
    assert [one.verdict for one in compare(scripted(blocks=4, slow=0.02, fast=0.01), METRICS, "slow")] == [
        "inconclusive",
        "inconclusive",
    ]
    assert compare(scripted(blocks=5, slow=0.02, fast=0.01), METRICS, "slow")[0].verdict == "better"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (timed(0.01, OUTPUT[:3]), "fast in block 1: 3 output tokens instead of 4, 3 timed"),
        (timed(0.01, (*OUTPUT, 5)), "fast in block 1: 5 output tokens instead of 4, 5 timed"),
        (Run(3, (0.1, 0.2), OUTPUT), "fast in block 1: 4 output tokens instead of 4, 2 timed"),
        (timed(0.01, prompt_tokens=2), "fast in block 1: 2 prompt tokens instead of 3"),
        (Run(3, (0.1, 0.2, math.nan, 0.4), OUTPUT), "fast in block 1: the times of its tokens are not in order"),
        (Run(3, (0.1, 0.2, 0.15, 0.4), OUTPUT), "fast in block 1: the times of its tokens are not in order"),
        (Run(3, (0.0, 0.2, 0.3, 0.4), OUTPUT), "fast in block 1: the times of its tokens are not in order"),
        (Run(3, (), ()), "fast in block 1: 0 output tokens instead of 4, 0 timed"),
    ],
)
def test_speed_is_withheld_when_the_work_was_not_what_was_asked_for(run, reason):
    found = compare(spoilt(scripted(slow=0.02, fast=0.01), "fast", run), METRICS, "slow")
    assert [one.withheld for one in found] == [reason, reason]


def test_a_baseline_that_shirked_makes_nobody_fast():
    found = compare(spoilt(scripted(slow=0.02, fast=0.01, other=0.01), "slow", timed(0.02, (1,))), METRICS, "slow")
    assert len(found) == 4
    assert all(isinstance(one, Withheld) and one.withheld.startswith("slow in block 1: 1 output") for one in found)


def test_one_arm_s_fault_is_not_the_other_s():
    samples = spoilt(scripted(slow=0.02, fast=0.01, other=0.01), "other", timed(0.01, OUTPUT[:1]))
    fast, other = compare(samples, {"latency": Latency()}, "slow")
    assert isinstance(fast, Comparison)
    assert isinstance(other, Withheld)


def monotonous(samples, *arms):
    return replace(
        samples,
        samples=tuple(
            replace(sample, run=replace(sample.run, output=(7,) * 4)) if sample.arm in arms else sample
            for sample in samples.samples
        ),
    )


def test_speed_of_a_model_that_repeats_one_token_is_withheld():
    samples = monotonous(scripted(slow=0.02, fast=0.01), "fast")
    assert {one.withheld for one in compare(samples, METRICS, "slow")} == {
        "fast repeats one token over and over and slow does not"
    }
    as_bad = monotonous(samples, "slow", "slow (again)")
    assert all(isinstance(one, Comparison) for one in compare(as_bad, METRICS, "slow"))
    # One lively run is enough to show that the model is alive.
    alive = spoilt(samples, "fast", timed(0.01))
    assert all(isinstance(one, Comparison) for one in compare(alive, METRICS, "slow"))


def test_a_metric_that_such_runs_do_not_have_is_withheld():
    one_token = Samples(
        Workload(3, 1, 5),
        ("slow", "fast"),
        None,
        tuple(Sample(block, p, arm, timed(0.1, (1,))) for block in range(5) for p, arm in enumerate(("slow", "fast"))),
    )
    decode, latency = compare(one_token, METRICS, "slow")
    assert decode.withheld == "runs of this length have no such figure"
    assert latency.verdict == "equivalent"


def test_results_are_plain_data():
    samples = scripted(slow=0.02, fast=0.01)
    shown = [one.to_dict() for one in compare(samples, METRICS, "slow")]
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown[0]["ratio"].keys() == {"value", "low", "high"}
    withheld = compare(monotonous(samples, "fast"), METRICS, "slow")[0].to_dict()
    assert withheld["withheld"]
    assert withheld["metric"] == "decode"


def test_footprints():
    before, after = Footprint(1000, 500), Footprint(250, 510)
    size, memory = compare_footprints(before, after, {"size": Size(), "memory": PeakMemory()}, "small")
    assert (size.baseline, size.value, size.ratio.value, size.verdict) == (1000, 250, 0.25, "better")
    assert size.ratio.low == size.ratio.high == 0.25
    assert memory.verdict == "equivalent"
    [larger] = compare_footprints(after, before, {"size": Size()}, "large")
    assert larger.verdict == "worse"
