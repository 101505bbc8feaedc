"""Both arms classify every image, and what a run says of its work is held against what was asked."""

from __future__ import annotations

import json

import numpy as np
import pytest

from optkit.bench import ImageWorkload, SessionImageArm, TransformersImageArm, compare, measure_passes
from optkit.builtin.speed import ImagesPerSecond
from optkit.errors import DamagedError, GateFailed
from optkit.metrics import ImageRun
from optkit.steps import Limits
from optkit.weights import load_folder
from optkit_backends.torch import Torch
from optkit_batching.dynamic import Dynamic
from tests.picturing import pixels

PIXELS = pixels(0, 40).numpy()


@pytest.fixture
def arms(tiny_classifier, tmp_path):
    limits = Limits(8, 1)
    session = Torch().open(tmp_path, tiny_classifier, limits)
    return (
        TransformersImageArm(load_folder(tiny_classifier), "theirs"),
        SessionImageArm(session, Dynamic(max_batch_size=8), limits, "ours"),
    )


def test_every_arm_classifies_everything_and_they_are_compared(arms):
    samples = measure_passes(arms, PIXELS[:9], ImageWorkload(9, 5), lambda *_: None, again="ours")
    assert samples.arms == ("theirs", "ours", "ours (again)")
    assert {sample.run.images for sample in samples.samples} == {9}
    [figure] = compare(samples, {"images_per_second": ImagesPerSecond()}, "theirs")
    rates = [9 / sample.run.seconds for sample in samples.of("theirs")]
    assert min(rates) <= figure.baseline <= max(rates)
    assert (figure.arm, figure.unit, figure.better) == ("ours", "img/s", "higher")
    head, *lines = map(json.loads, samples.to_jsonl().splitlines())
    assert head["workload"] == {"images": 9, "blocks": 5, "seed": 0}
    assert lines[0]["run"].keys() == {"images", "seconds"}


def test_a_pass_counts_what_it_did(arms):
    for arm in arms:
        assert arm.run(PIXELS[:33]).images == 33
        arm.answer({"pixels": PIXELS.shape[1:]})
        arm.close()
        arm.close()


@pytest.mark.parametrize("run", [ImageRun(39, 1.0), ImageRun(40, 0.0), ImageRun(40, float("nan"))])
def test_a_pass_that_did_other_work_is_told(run):
    assert ImageWorkload(40, 5).differs(ImageRun(40, 1.0)) is None
    assert ImageWorkload(40, 5).differs(run) in {"39 images instead of 40", "it took no time"}


def test_logits_that_are_not_finite_are_no_speed(arms):
    broken = np.full_like(PIXELS[:2], np.nan)
    for arm, kind in zip(arms, (DamagedError, GateFailed), strict=True):
        with pytest.raises(kind, match="NaN or infinite logits"):
            arm.run(broken)
