"""Both arms on one tiny model: the same tokens, the asked-for number of them, and times in order."""

from __future__ import annotations

import pytest
import torch

from optkit import hardware
from optkit.bench import SessionArm, TransformersArm, Workload, compare, measure
from optkit.builtin.speed import DecodeTokensPerSecond, Latency
from optkit.steps import Limits
from optkit_backends.torch import Torch
from optkit_batching.static import Static

PROMPT = (7, 42, 99, 5, 300)


@pytest.fixture
def session_arm(tiny_folder, tmp_path):
    arm = SessionArm(Torch().open(tmp_path, tiny_folder, Limits(1, 64)), Static(), "ours")
    yield arm
    arm.close()


def greedy(module, prompt, count):
    """Token by token without any cache."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(module(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def check(run, count):
    assert run.prompt_tokens == len(PROMPT)
    assert len(run.output) == len(run.token_seconds) == count
    assert run.token_seconds[0] > 0
    assert list(run.token_seconds) == sorted(run.token_seconds)


def test_transformers_generates_greedily(tiny_llama):
    model = tiny_llama()
    run = TransformersArm(model, "transformers").run(PROMPT, 12)
    check(run, 12)
    assert run.output == greedy(model.module, PROMPT, 12)


def test_a_session_generates_the_same(tiny_llama, session_arm):
    model = tiny_llama()
    for count in (12, 1, 3):  # a second run starts afresh
        run = session_arm.run(PROMPT, count)
        check(run, count)
        assert run.output == greedy(model.module, PROMPT, count)


def test_no_arm_stops_or_swerves_for_what_the_model_prefers(tiny_llama, session_arm):
    model = tiny_llama()
    expected = greedy(model.module, PROMPT, 8)
    own = model.module.generation_config
    own.eos_token_id, own.repetition_penalty, own.do_sample = expected[2], 50.0, True
    assert TransformersArm(model, "transformers").run(PROMPT, 8).output == expected
    assert model.module.generation_config is own
    assert session_arm.run(PROMPT, 8).output == expected


def test_all_arms_run_on_all_cores_and_leave_the_setting_alone(tiny_llama, session_arm):
    model, seen = tiny_llama(), []
    model.module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    session = session_arm.session
    session._module.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    TransformersArm(model, "transformers").run(PROMPT, 2)
    session_arm.run(PROMPT, 2)
    assert seen == [hardware.usable_cores()] * 4
    assert torch.get_num_threads() == before


def test_a_whole_session_from_arms_to_figures(tiny_llama, session_arm):
    arms = [TransformersArm(tiny_llama(), "transformers"), session_arm]
    samples = measure(arms, [PROMPT], Workload(5, 8, 5), lambda *_: None, again="ours")
    found = compare(samples, {"decode": DecodeTokensPerSecond(), "latency": Latency()}, "transformers")
    assert [(one.arm, one.metric) for one in found] == [("ours", "decode"), ("ours", "latency")]
    for one in found:
        assert one.ratio.low <= one.ratio.value <= one.ratio.high
        assert one.noise is not None
        assert one.baseline > 0
    assert len({sample.run.output for sample in samples.samples}) == 1
