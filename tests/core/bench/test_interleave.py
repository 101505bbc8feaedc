"""The order of a session: balanced, random and repeatable, with every run on record."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.bench import GenerationArm, Workload, measure
from optkit.errors import RecipeError
from optkit.metrics import Run

PROMPTS = [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]


class ScriptedArm(GenerationArm):
    """Answers at once with the times of its script, and keeps a diary in a list that arms share."""

    def __init__(self, name, diary, seconds=0.1, fail_at=None, error=KeyboardInterrupt):
        self.name, self.diary, self.seconds, self.closed = name, diary, seconds, 0
        self.fail_at, self.error, self.runs = fail_at, error, 0

    def run(self, prompt, output_tokens):
        self.runs += 1
        if self.runs == self.fail_at:
            raise self.error
        self.diary.append((self.name, prompt))
        times = tuple(self.seconds * (index + 1) for index in range(output_tokens))
        return Run(len(prompt), times, tuple(range(output_tokens)))

    def close(self):
        self.closed += 1


def session(names="ab", blocks=3, seed=0, again=None, diary=None, **workload):
    diary = [] if diary is None else diary
    arms = [ScriptedArm(name, diary) for name in names]
    work = Workload(workload.get("prompt_tokens", 3), workload.get("output_tokens", 4), blocks, seed)
    return measure(arms, PROMPTS, work, lambda *_: None, again=again), arms, diary


@settings(max_examples=25)  # each collects garbage, as a real session does
@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**32 - 1), st.booleans())
def test_blocks_are_mirrored_and_balanced(count, blocks, seed, twice):
    names = [f"arm{index}" for index in range(count)]
    samples, _, _ = session(names, blocks, seed, again="arm0" if twice else None)
    assert len(samples.samples) == 2 * len(samples.arms) * blocks
    for block in range(blocks):
        order = [sample.arm for sample in samples.samples if sample.block == block]
        assert order == order[::-1]
        assert Counter(order) == dict.fromkeys(samples.arms, 2)
    assert [sample.position for sample in samples.samples] == list(range(2 * len(samples.arms))) * blocks


def test_the_order_is_random_between_blocks_and_the_same_for_the_same_seed():
    def first(seed):
        return [sample.arm for sample in session(blocks=40, seed=seed)[0].samples if sample.position == 0]

    assert first(1) == first(1)
    assert first(1) != first(2)
    # 40 fair coins: outside of 8 to 32 once in ten thousand.
    assert 8 <= first(1).count("a") <= 32


def test_everyone_warms_up_first_and_that_does_not_count():
    samples, _, diary = session("abc", blocks=2)
    assert [name for name, _ in diary[:3]] == ["a", "b", "c"]
    assert len(diary) == 3 + len(samples.samples)


def test_all_arms_of_one_half_get_one_prompt_and_the_halves_differ():
    _, _, diary = session("abc", blocks=3)
    halves = [diary[start : start + 3] for start in range(3, len(diary), 3)]
    prompts = [{prompt for _, prompt in half} for half in halves]
    assert prompts == [{PROMPTS[index % 3][:3]} for index in range(6)]


def test_an_arm_against_itself():
    samples, arms, diary = session(again="b", blocks=5)
    assert samples.arms == ("a", "b", "b (again)")
    assert samples.again == ("b", "b (again)")
    assert len(samples.of("b (again)")) == len(samples.of("b")) == 10
    assert Counter(name for name, _ in diary) == {"a": 11, "b": 21}
    assert [arm.closed for arm in arms] == [1, 1]


class LitteringArm(ScriptedArm):
    """Looks whether what was there before is exempt from collection, and leaves a cycle of garbage behind."""

    litter: ClassVar[list] = []

    def run(self, prompt, output_tokens):
        self.diary.append((gc.get_freeze_count() > 0, sum(reference() is not None for reference in self.litter)))
        cycle = ScriptedArm("litter", [])
        cycle.diary.append(cycle)
        self.litter.append(weakref.ref(cycle))
        return super().run(prompt, output_tokens)


def test_no_run_collects_another_s_garbage():
    diary = []
    measure([LitteringArm("a", diary), LitteringArm("b", diary)], PROMPTS, Workload(3, 4, 2), lambda *_: None)
    seen = diary[::2]
    assert [frozen for frozen, _ in seen] == [False, False, *[True] * 8]
    assert [litter for _, litter in seen[2:]] == [0] * 8
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("fail_at", [1, 4])
def test_whatever_ends_the_session_every_arm_is_closed(error, fail_at):
    arms = [ScriptedArm("a", []), ScriptedArm("b", [], fail_at=fail_at, error=error)]
    with pytest.raises(error):
        measure(arms, PROMPTS, Workload(3, 4, 3), lambda *_: None)
    assert [arm.closed for arm in arms] == [1, 1]
    assert gc.get_freeze_count() == 0


def test_progress_counts_up_to_its_total():
    seen = []
    arms = [ScriptedArm("a", []), ScriptedArm("b", [])]
    measure(arms, PROMPTS, Workload(3, 4, 2), lambda *state: seen.append(state))
    total = 2 + 2 * 2 * 2
    assert [done for done, _, _ in seen] == list(range(total + 1))
    assert {of for _, of, _ in seen} == {total}


def test_a_short_prompt_is_refused_before_anything_runs():
    with pytest.raises(RecipeError, match="a prompt has 4 tokens, found 5; lower the benchmark's prompt_tokens"):
        session(prompt_tokens=5)


@pytest.mark.parametrize(("names", "again"), [("aa", None), ("ab", "c")])
def test_names_must_tell_arms_apart(names, again):
    with pytest.raises(ValueError, match="must differ in name"):
        session(names, again=again)


@pytest.mark.parametrize("fields", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_a_workload_is_some_work(fields):
    with pytest.raises(ValueError, match="at least 1"):
        Workload(*fields)


def test_jsonl_holds_every_run():
    samples, _, _ = session(again="a")
    head, *lines = [json.loads(line) for line in samples.to_jsonl().splitlines()]
    assert head == {
        "workload": {"prompt_tokens": 3, "output_tokens": 4, "blocks": 3, "seed": 0},
        "arms": ["a", "b", "a (again)"],
        "again": ["a", "a (again)"],
    }
    assert [(line["block"], line["position"], line["arm"]) for line in lines] == [
        (sample.block, sample.position, sample.arm) for sample in samples.samples
    ]
    assert [Run(**{name: _tupled(value) for name, value in line["run"].items()}) for line in lines] == [
        sample.run for sample in samples.samples
    ]


def _tupled(value):
    return tuple(value) if isinstance(value, list) else value
