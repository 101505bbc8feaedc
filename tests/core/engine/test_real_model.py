"""A real model gives the same text alone and batched, with the prefix cache and without, evicted or not."""

from __future__ import annotations

import pytest

from optkit.builtin.gguf import GGUF
from optkit.engine import Engine, Request, SamplingParams
from optkit.engine.speculation import PromptLookup
from optkit.engine.text import chat, encode, load_tokenizer
from optkit.steps import Limits
from optkit.weights import save_folder
from optkit_backends.torch import Torch
from optkit_batching.continuous import Continuous
from optkit_batching.static import Static

pytestmark = pytest.mark.slow
OUTPUT = 24
SUBJECTS = ("rivers", "the number seven", "bread", "Paris", "the moon", "a small cat", "music", "old maps")
ASKS = (
    "Tell me about {}.",
    "Write one sentence about {}, and say why it matters to people who have never seen it before.",
    "What is {}?",
    "List three facts about {}: first, second and third. Keep every fact short, and do not repeat yourself.",
)


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "weights"
    save_folder(GGUF(file=str(smollm2)).load(), folder)
    return folder


@pytest.fixture(scope="module")
def requests(folder):
    tokenizer = load_tokenizer(folder)
    prompts = [encode(tokenizer, chat(ask.format(subject))) for subject in SUBJECTS for ask in ASKS]
    assert len(prompts) == 32
    return [Request(prompt, SamplingParams(max_tokens=OUTPUT)) for prompt in prompts]


def answers(folder, requests, batcher, tokens=None, drafter=None):
    with Torch().open(folder, folder, Limits(batcher.max_sequences, 256, tokens)) as session:
        engine = Engine(session, batcher, end_tokens=(2,), drafter=drafter)
        ids = [engine.add(request) for request in requests]
        output = {identity: [] for identity in ids}
        while engine.busy:
            for event in engine.step():
                assert not event.error
                output[event.request].append(event.token)
        engine.check()
        return [output[identity] for identity in ids], engine.stats


@pytest.fixture(scope="module")
def alone(folder, requests):
    return answers(folder, requests, Static(max_batch_size=1))[0]


def test_batched_is_alone(folder, requests, alone):
    assert answers(folder, requests, Static(max_batch_size=8))[0] == alone
    cold, stats = answers(folder, requests, Continuous(max_batch_size=16, max_step_tokens=128, prefix_cache=False))
    assert cold == alone
    assert stats.cached_tokens == 0


def test_a_shared_prefix_from_the_cache_is_alone(folder, requests, alone):
    cached, stats = answers(folder, requests, Continuous(max_batch_size=8, max_step_tokens=128))
    assert cached == alone
    assert stats.cached_tokens >= 24 * 16, "a block of the system prompt, for all but the first batch"


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_evicted_is_alone(folder, requests, alone, preemption):
    batcher = Continuous(
        max_batch_size=16, max_step_tokens=128, admission="none", preemption=preemption, prefix_cache=False
    )
    evicted, stats = answers(folder, requests, batcher, tokens=384)
    assert evicted == alone
    assert (stats.recomputed, stats.swapped)[preemption == "swap"] > 0


def test_speculation_is_alone(folder, requests, alone):
    guessed, stats = answers(folder, requests, Continuous(max_batch_size=8), drafter=PromptLookup(shortest=1))
    assert guessed == alone
    assert stats.accepted > 0
