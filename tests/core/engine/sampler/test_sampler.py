"""Each parameter does what its documentation says, alone and with others, and whatever else is in the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.engine import SamplingParams
from optkit.engine.sampler import Sampler

VOCAB, END = 40, frozenset({2, 3})
LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32))


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * 2).astype(np.float32)


def sample_one(
    row: np.ndarray, prompt: Sequence[int] = (0,), output: Sequence[int] = (), end: frozenset[int] = END, **params: Any
) -> int:
    """The greedy choice, or that of seed 0, after `output`."""
    sampler = Sampler(len(row), end)
    handle = sampler.open(SamplingParams(**params), prompt, seed=0)
    for token in output:
        sampler.accept([handle], [token])
    return sampler.sample(row[None], [handle], [len(prompt) + len(output)]).tokens[0]


def frequencies(draws: int = 4000, **params: Any) -> np.ndarray:
    sampler = Sampler(4)
    handle = sampler.open(SamplingParams(**params), [0], seed=3)
    tokens = sampler.sample(np.tile(LOGITS, (draws, 1)), [handle] * draws, range(1, draws + 1)).tokens
    return np.bincount(tokens, minlength=4) / draws


def test_greedy_takes_the_largest_and_of_ties_the_first():
    sampler = Sampler(3)
    handle = sampler.open(SamplingParams(), [0], seed=0)
    logits = np.array([[0, 2, 1], [5, 2, 1], [1, 4, 4]], dtype=np.float32)
    found = sampler.sample(logits, [handle] * 3, [1, 2, 3])
    assert found.tokens == [1, 0, 1]
    assert found.logprobs == [None] * 3


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
        ({"temperature": 1.0, "top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_k": 3}, [0.5263, 0.3158, 0.1579, 0]),
        ({"temperature": 1.0, "min_p": 0.2}, [0.5263, 0.3158, 0.1579, 0]),
        ({"temperature": 1.0, "logit_bias": {3: float(np.log(10))}}, [0.3448, 0.2069, 0.1034, 0.3448]),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(params, expected):
    # Four standard errors of a frequency over 4000 draws.
    found = frequencies(**params)
    np.testing.assert_allclose(found, expected, atol=0.032)
    assert not found[np.array(expected) == 0].any()


def test_seed_and_sample_decide_the_draws():
    def tokens(seed: int, sample: int) -> list[int]:
        sampler = Sampler(VOCAB)
        handle = sampler.open(SamplingParams(temperature=1.0), [0], seed=seed, sample=sample)
        return sampler.sample(random_logits(50), [handle] * 50, range(1, 51)).tokens

    assert tokens(2**64 - 1, 0) == tokens(2**64 - 1, 0)
    assert len({tuple(tokens(seed, sample)) for seed in (0, 1, 2**63) for sample in (0, 1)}) == 6


def test_end_and_stop_tokens_wait_for_min_tokens():
    row = np.zeros(VOCAB, dtype=np.float32)
    row[[2, 3, 7, 9]] = 9.0, 8.0, 7.0, 6.0
    wish = {"min_tokens": 2, "stop_token_ids": [7]}
    assert [sample_one(row, output=[5] * length, **wish) for length in range(4)] == [9, 9, 2, 2]
    assert sample_one(row, ignore_eos=True, **wish) == 9
    assert sample_one(row, end=frozenset(), min_tokens=2) == 2


def test_an_end_token_that_is_all_there_is_comes_before_min_tokens():
    row = np.full(VOCAB, -np.inf, dtype=np.float32)
    row[3] = 1.0
    assert sample_one(row, min_tokens=5) == 3


def test_repetition_counts_prompt_and_output_and_the_others_the_output():
    row = np.zeros(VOCAB, dtype=np.float32)
    row[[4, 5, 6]] = 3.0, 2.5, 2.0
    assert sample_one(row, prompt=[4], repetition_penalty=1.3) == 5
    assert sample_one(row, prompt=[4], output=[5], repetition_penalty=1.6) == 6
    assert sample_one(row, prompt=[4], presence_penalty=2.0, frequency_penalty=2.0) == 4
    assert sample_one(row, output=[4], presence_penalty=0.6) == 5
    assert sample_one(row, output=[4, 4], frequency_penalty=0.2) == 4
    assert sample_one(row, output=[4, 4, 4], frequency_penalty=0.2) == 5
    assert sample_one(-row - 1, prompt=[0], repetition_penalty=1.5) == 1


def test_extreme_bias_and_penalties_stay_finite():
    row = np.full(VOCAB, 3e38, dtype=np.float32)
    bias = {9: 1e300, 8: -1e300}
    assert sample_one(row, prompt=[9], logit_bias=bias, repetition_penalty=1e-300, temperature=1.0, top_p=0.01) == 9
    assert sample_one(row - np.float32(3e38), logit_bias=bias, temperature=1.0) == 9


def test_sampling_leaves_logits_and_state_as_they_are():
    logits = random_logits(6)
    before = logits.copy()
    sampler = Sampler(VOCAB, END)
    wishes = [{}, {"logit_bias": {1: 50.0}}, {"min_tokens": 5}, {"presence_penalty": 1.0}, {"temperature": 1.0}]
    handles = [sampler.open(SamplingParams(**wish), [0], seed=5) for wish in [*wishes, {"logprobs": 3}]]
    first = sampler.sample(logits, handles, [1] * 6)
    assert sampler.sample(logits, handles, [1] * 6) == first
    np.testing.assert_array_equal(logits, before)


def test_handles_are_used_again_with_nothing_left_in_them():
    sampler = Sampler(VOCAB, END)
    old = sampler.open(
        SamplingParams(logit_bias={7: 50.0}, min_tokens=9, repetition_penalty=2.0, logprobs=1), [1, 2, 7], seed=0
    )
    sampler.accept([old], [7])
    sampler.close(old)
    logits = random_logits(1)
    new = sampler.open(SamplingParams(), [0], seed=0)
    assert new == old
    found = sampler.sample(logits, [new], [1])
    assert found.tokens == [int(logits.argmax())]
    assert found.logprobs == [None]
    penalized = sampler.open(SamplingParams(frequency_penalty=2.0), [0], seed=0)
    assert sampler.sample(logits, [penalized], [1]).tokens == found.tokens


def test_logprobs_are_of_the_unaltered_logits_and_only_where_asked():
    logits = random_logits(4)
    sampler = Sampler(VOCAB)
    wishes = [{"logprobs": 2, "logit_bias": {7: 100.0}}, {}, {"logprobs": 0}, {"n": 1, "best_of": 2}]
    handles = [sampler.open(SamplingParams(**wish), [0], seed=0) for wish in wishes]
    found = sampler.sample(logits, handles, [1] * 4)
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert found.tokens[0] == 7
    assert [one is not None for one in found.logprobs] == [True, False, True, True]
    assert [len(one.top) for one in found.logprobs if one is not None] == [2, 0, 0]
    for row, one in enumerate(found.logprobs):
        if one is not None:
            assert one.token == found.tokens[row]
            assert one.logprob == pytest.approx(expected[row, one.token], abs=1e-5)


def test_speculative_rows_get_what_single_steps_give():
    sampler = Sampler(VOCAB)
    handle = sampler.open(SamplingParams(temperature=1.0, top_p=0.9), [0, 1], seed=11)
    logits = random_logits(5)
    together = sampler.sample(logits, [handle] * 5, range(2, 7)).tokens
    assert together == [sampler.sample(logits[[row]], [handle], [2 + row]).tokens[0] for row in range(5)]


WISHES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        "top_k": st.integers(0, 60),
        "top_p": st.sampled_from([0.13, 0.52, 0.91, 1.0]),
        "min_p": st.sampled_from([0.0, 0.011, 0.3]),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.45]),
        "presence_penalty": st.sampled_from([-0.6, 0.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.4, 0.0, 0.35]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-3.1, 0.4, 2.3]), max_size=4),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(st.integers(4, VOCAB - 1), max_size=2).map(tuple),
        "logprobs": st.sampled_from([None, 0, 3]),
    },
)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@given(WISHES, TOKENS.filter(bool), TOKENS, st.integers(0, 10**6))
@settings(max_examples=60)
def test_any_combination_follows_the_reference(altered, distribution, wish, prompt, output, seed):
    params, draws = SamplingParams(**wish), 400
    row = random_logits(1, seed=seed)[0]
    sampler = Sampler(VOCAB, END)
    handles = [sampler.open(params, prompt, seed=seed, sample=sample) for sample in range(draws)]
    for token in output:
        sampler.accept(handles, [token] * draws)
    found = sampler.sample(np.tile(row, (draws, 1)), handles, [len(prompt) + len(output)] * draws).tokens
    expected = distribution(altered(row, params, prompt, output, sorted(END)), params)
    counts = np.bincount(found, minlength=VOCAB)
    assert not counts[expected == 0].any()
    # Six standard errors: thousands of frequencies are looked at.
    assert (np.abs(counts / draws - expected) <= 6 * np.sqrt(expected * (1 - expected) / draws) + 2 / draws).all()


@given(st.lists(st.tuples(WISHES, TOKENS, st.integers(0, 10**6)), min_size=1, max_size=12), st.data())
@settings(max_examples=60)
def test_a_row_gets_the_same_token_alone_and_in_any_batch(rows, data):
    vocab = data.draw(st.sampled_from([VOCAB, 300, 2500]))
    sampler = Sampler(vocab, END)
    handles = [
        sampler.open(SamplingParams(**wish), [0], seed=seed, sample=place) for place, (wish, _, seed) in enumerate(rows)
    ]
    longest = max(len(output) for _, output, _ in rows)
    for step in range(longest):
        going = [place for place, (_, output, _) in enumerate(rows) if step < len(output)]
        sampler.accept([handles[place] for place in going], [rows[place][1][step] for place in going])
    logits = np.concatenate([random_logits(1, vocab, seed) for _, _, seed in rows])
    positions = [1 + len(output) for _, output, _ in rows]
    together = sampler.sample(logits, handles, positions)
    for row in range(len(rows)):
        alone = sampler.sample(logits[[row]], [handles[row]], [positions[row]])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0] == together.logprobs[row]
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = sampler.sample(logits[order], [handles[row] for row in order], [positions[row] for row in order])
    assert shuffled.tokens == [together.tokens[row] for row in order]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, VOCAB - 1)), max_size=200), TOKENS)
def test_penalties_count_whatever_is_accepted_in_whatever_order(altered, accepted, prompt):
    params = SamplingParams(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2)
    sampler = Sampler(VOCAB)
    handles = [sampler.open(params, prompt, seed=0) for _ in range(4)]
    for start in range(0, len(accepted), 7):
        some = accepted[start : start + 7]
        sampler.accept([handles[which] for which, _ in some], [token for _, token in some])
    logits = random_logits(4)
    found = sampler.sample(logits, handles, [len(prompt)] * 4).tokens
    for which in range(4):
        output = [token for handle, token in accepted if handle == which]
        assert found[which] == altered(logits[which], params, prompt, output).argmax(), Counter(output)
