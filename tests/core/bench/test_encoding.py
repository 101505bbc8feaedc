"""Both arms embed everything, and what a run says of its work is held against what was asked."""

from __future__ import annotations

import json

import numpy as np
import pytest

from optkit.bench import (
    EncodingArm,
    EncodingWorkload,
    SessionEncodingArm,
    TransformersEncodingArm,
    compare,
    measure_passes,
)
from optkit.builtin.speed import SequencesPerSecond
from optkit.errors import DamagedError, MachineError
from optkit.metrics import EncodingRun
from optkit.steps import Limits
from optkit_backends.torch import Torch
from optkit_batching.bucketed import Bucketed
from optkit_batching.dynamic import Dynamic

RANDOM = np.random.default_rng(1)
SEQUENCES = [tuple(RANDOM.integers(10, 300, size=RANDOM.integers(1, 60)).tolist()) for _ in range(70)]
TOKENS = sum(map(len, SEQUENCES))


@pytest.fixture
def session_arm(tiny_encoder, tmp_path):
    limits = Limits(16, 64)
    return SessionEncodingArm(
        Torch().open(tmp_path, tiny_encoder, limits), Bucketed(max_batch_size=16), tiny_encoder, limits, "ours"
    )


def test_every_arm_embeds_everything(tiny_bert, session_arm):
    for arm in (TransformersEncodingArm(tiny_bert(), "theirs"), session_arm):
        run = arm.run(SEQUENCES)
        assert (run.sequences, run.tokens) == (70, TOKENS)
        assert run.seconds > 0
        arm.close()
        arm.close()


def test_the_baseline_runs_batches_of_32_longest_first(tiny_bert, monkeypatch):
    model, shapes = tiny_bert(), []
    model.module.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    TransformersEncodingArm(model, "theirs").run(SEQUENCES)
    assert [rows for rows, _ in shapes] == [32, 32, 6]
    lengths = sorted(map(len, SEQUENCES), reverse=True)
    assert [width for _, width in shapes] == [lengths[0], lengths[32], lengths[64]]


def test_arms_take_turns_and_are_compared(tiny_bert, session_arm):
    arms = [TransformersEncodingArm(tiny_bert(), "theirs"), session_arm]
    work = EncodingWorkload(70, TOKENS, 5)
    samples = measure_passes(arms, SEQUENCES, work, lambda *_: None, again="ours")
    assert samples.arms == ("theirs", "ours", "ours (again)")
    assert len(samples.samples) == 5 * 2 * 3
    [figure] = compare(samples, {"sequences_per_second": SequencesPerSecond()}, "theirs")
    rates = [70 / sample.run.seconds for sample in samples.of("theirs")]
    assert min(rates) <= figure.baseline <= max(rates)
    assert (figure.arm, figure.unit, figure.better) == ("ours", "seq/s", "higher")
    head, *lines = map(json.loads, samples.to_jsonl().splitlines())
    assert head["workload"] == {"sequences": 70, "tokens": TOKENS, "blocks": 5, "seed": 0}
    assert lines[0]["run"].keys() == {"sequences", "tokens", "seconds"}


class Scripted(EncodingArm):
    def __init__(self, name, run):
        self.name, self._run, self.closed = name, run, 0

    def run(self, sequences):
        return self._run

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (EncodingRun(2, 9, 1.0), "fast in block 1: 2 sequences of 9 tokens instead of 3 of 9"),
        (EncodingRun(3, 8, 1.0), "fast in block 1: 3 sequences of 8 tokens instead of 3 of 9"),
        (EncodingRun(3, 9, 0.0), "fast in block 1: it took no time"),
        (EncodingRun(3, 9, float("nan")), "fast in block 1: it took no time"),
    ],
)
def test_speed_is_withheld_where_the_work_differs(run, words):
    arms = [Scripted("slow", EncodingRun(3, 9, 2.0)), Scripted("fast", run)]
    samples = measure_passes(arms, [(1,)], EncodingWorkload(3, 9, 5), lambda *_: None)
    [figure] = compare(samples, {"rate": SequencesPerSecond()}, "slow")
    assert figure.withheld == words
    assert [arm.closed for arm in arms] == [1, 1]


def test_a_ratio_is_that_of_the_seconds():
    arms = [Scripted("slow", EncodingRun(3, 9, 2.0)), Scripted("fast", EncodingRun(3, 9, 0.5))]
    samples = measure_passes(arms, [(1,)], EncodingWorkload(3, 9, 5), lambda *_: None, again="fast")
    [figure] = compare(samples, {"rate": SequencesPerSecond()}, "slow")
    assert (figure.baseline, figure.value, figure.ratio.value) == pytest.approx((1.5, 6.0, 4.0))
    assert figure.verdict == "better"


def test_embeddings_that_are_not_finite_are_no_speed(tiny_bert, tiny_encoder, tmp_path):
    broken = tiny_bert()
    broken.module.embeddings.LayerNorm.bias[:] = float("nan")
    with pytest.raises(DamagedError, match="the baseline gives NaN"):
        TransformersEncodingArm(broken, "theirs").run(SEQUENCES)
    limits = Limits(16, 64)
    session = Torch().open(tmp_path, tiny_encoder, limits)
    session._module.embeddings.LayerNorm.bias[:] = float("nan")
    arm = SessionEncodingArm(session, Dynamic(), tiny_encoder, limits, "ours")
    with pytest.raises(MachineError, match=r"text 0: the model failed \(the model gave NaN"):
        arm.run(SEQUENCES)
