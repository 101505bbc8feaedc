"""A runtime that batches by itself, driven as every other: events, text, ends and errors, and a whole artifact."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from optkit import LLM, AsyncLLM, SamplingParams, Speculation, Structure
from optkit.engine import Engine, Request
from optkit.engine.streaming import StreamingEngine
from optkit.engine.text_engine import TextEngine
from optkit.errors import MachineError, RecipeError, RequestError
from optkit.hookspecs import hookimpl
from optkit.plugins import Plugins
from optkit.steps import Limits
from optkit.weights import save_folder
from optkit_backends.torch import Torch
from optkit_batching.continuous import Continuous
from tests.batching_runtime import BatchingSession, BatchingTorch

PROMPTS = [(10, 11, 12, 13), (7,), tuple(range(20, 60)), (99, 5, 42)]
LIMITS = Limits(max_batch_size=3, max_length=96)
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def weights(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_folder(tiny_llama(), folder)
    return folder


@pytest.fixture
def session(weights):
    with BatchingSession(Torch().open(weights, weights, LIMITS)) as opened:
        yield opened


@pytest.fixture
def engine(session):
    made = StreamingEngine(session)
    yield made
    made.close()


def finish(engine):
    """All events until nothing is alive, by request and sample."""
    events = {}
    while engine.busy:
        for event in engine.step():
            events.setdefault((event.request, event.sample), []).append(event)
    return events


def tokens(events):
    return [event.token for event in events if event.token is not None]


def expected(weights, request, end_tokens=()):
    """What optkit's own engine gives it alone."""
    with Torch().open(weights, weights, LIMITS) as session:
        own = Engine(session, Continuous(max_batch_size=3), end_tokens=end_tokens)
        return list(own.stream(request))


def wait_until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_many_at_once_get_what_each_gets_alone(engine, weights):
    requests = [Request(prompt, SamplingParams(max_tokens=9 + place)) for place, prompt in enumerate(PROMPTS * 2)]
    ids = [engine.add(request) for request in requests]
    found = finish(engine)
    for identity, request in zip(ids, requests, strict=True):
        wanted = expected(weights, request)
        events = found[identity, 0]
        assert tokens(events) == tokens(wanted)
        assert [event.finished for event in events] == [event.finished for event in wanted]
        assert [event.last for event in events] == [False] * (len(events) - 1) + [True]
        assert [event.prompt is not None for event in events] == [True] + [False] * (len(events) - 1)
        assert events[0].prompt.tokens == len(request.prompt)
    stats = engine.stats
    assert (stats.requests, stats.running, stats.waiting) == (8, 0, 0)
    assert stats.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert stats.output_tokens == sum(request.params.max_tokens for request in requests)


def test_an_end_token_ends_a_sequence_unless_it_is_ignored(session, weights):
    whole = tokens(expected(weights, Request(PROMPTS[0], LONG)))
    end = whole[5]
    engine = StreamingEngine(session, end_tokens=(end,))
    try:
        request = Request(PROMPTS[0], SamplingParams(max_tokens=40))
        stopped = list(engine.stream(request))
        assert tokens(stopped) == whole[: whole.index(end) + 1]
        assert stopped[-1].finished == "stop"
        assert tokens(engine.stream(Request(PROMPTS[0], LONG))) == whole
        named = SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(whole[2],))
        assert tokens(engine.stream(Request(PROMPTS[0], named))) == whole[: whole.index(whole[2]) + 1]
    finally:
        engine.close()


def test_samples_of_one_request_have_seeds_of_their_own(engine):
    params = SamplingParams(max_tokens=12, temperature=2.0, seed=(1 << 64) - 1, n=3, ignore_eos=True)
    drawn = []
    for _ in range(2):
        engine.add(Request(PROMPTS[0], params))
        found = finish(engine)
        assert sum(event.last for events in found.values() for event in events) == 1
        drawn.append([tokens(found[key]) for key in sorted(found)])
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn[0]}) == 3


def test_text_stops_before_a_stop_string(session, weights, tiny_tokenizer):
    engine = StreamingEngine(session)
    text = TextEngine(engine, tiny_tokenizer, ())

    def complete(params):
        text.add(PROMPTS[2], params)
        deltas = []
        while text.busy:
            deltas += text.step()
        assert [delta.last for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        return "".join(delta.text for delta in deltas), deltas[-1].finished

    try:
        whole, finished = complete(LONG)
        assert finished == "length"
        stop = whole[4:7]
        found, finished = complete(LONG.model_copy(update={"stop": (stop,)}))
        assert (found, finished) == (whole[: whole.index(stop)], "stop")
        wait_until(lambda: not session.engine.busy)
    finally:
        engine.close()


def test_what_is_cancelled_ends_in_the_runtime_too(engine, session):
    kept, gone = engine.add(Request(PROMPTS[0], LONG)), engine.add(Request(PROMPTS[1], LONG))
    first = engine.step()
    assert first
    engine.cancel(gone)
    engine.cancel(gone)
    found = finish(engine)
    assert found[gone, 0][-1].finished == "cancelled"
    assert found[gone, 0][-1].last
    assert len(tokens([event for event in first if event.request == kept] + found[kept, 0])) == 40
    wait_until(lambda: not session.engine.busy)
    session.engine.check()
    assert session.engine.stats.output_tokens < 80


def test_what_runs_out_of_time_keeps_what_it_has(session):
    now = [100.0]
    engine = StreamingEngine(session, clock=lambda: now[0])
    try:
        engine.add(Request(PROMPTS[0], LONG, timeout=5.0))
        assert tokens(engine.step())
        now[0] += 5.0
        assert [(event.finished, event.last) for event in engine.step()] == [("deadline", True)]
        assert not engine.busy
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"seed": 3}, "does not do seed, found 3; leave it out"),
        ({"logit_bias": {5: 1.0}}, "does not do logit_bias"),
        ({"logprobs": 0}, "does not do logprobs"),
        ({"prompt_logprobs": 1}, "does not do prompt_logprobs"),
        ({"n": 1, "best_of": 2}, "does not do best_of"),
        ({"structure": Structure(regex="a+")}, "does not do structure"),
        ({"max_tokens": 93}, "a sequence can have 96"),
        ({"n": 4}, "the batch holds 3 sequences"),
    ],
)
def test_what_the_runtime_cannot_do_is_refused_when_it_comes(wish, words, weights):
    with BatchingSession(Torch().open(weights, weights, LIMITS), frozenset({"temperature"})) as session:
        engine = StreamingEngine(session)
        with pytest.raises(RequestError, match=words):
            engine.add(Request(PROMPTS[0], SamplingParams(**{"max_tokens": 9} | wish)))
        assert not engine.busy
        engine.add(Request(PROMPTS[0], SamplingParams(n=2, best_of=2, temperature=1.0, max_tokens=2)))
        assert len(finish(engine)) == 2
        engine.close()


def test_a_request_that_the_runtime_refuses_fails_alone(engine, session):
    session.refused = PROMPTS[1][0]
    ids = [engine.add(Request(prompt, LONG)) for prompt in PROMPTS[:2]]
    found = finish(engine)
    (failed,) = found[ids[1], 0]
    assert (failed.finished, failed.last, failed.error) == ("error", True, "ValueError: not this one")
    assert len(tokens(found[ids[0], 0])) == 40


def test_a_runtime_that_breaks_fails_as_a_whole(engine, session):
    engine.add(Request(PROMPTS[0], LONG))
    engine.step()
    session.fault = ValueError("out of steam")
    with pytest.raises(MachineError, match=r"the runtime broke \(out of steam\)"):
        finish(engine)


def test_an_output_that_ends_early_is_an_error(session):
    class Short(BatchingSession):
        async def submit(self, request):
            yield 5

    session.__class__ = Short
    engine = StreamingEngine(session)
    try:
        *_, last = engine.stream(Request(PROMPTS[0], LONG))
        assert (last.finished, last.error) == ("error", "the runtime ended the output early")
    finally:
        engine.close()


def test_closing_with_work_in_flight_ends_it(session):
    before = threading.active_count()
    engine = StreamingEngine(session)
    for prompt in PROMPTS:
        engine.add(Request(prompt, LONG))
    engine.step()
    engine.close()
    engine.close()
    assert threading.active_count() == before
    assert not engine.busy
    wait_until(lambda: not session.engine.busy)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.sampled_from(["add", "samples", "cancel", "stop", "step"]), max_size=25))
@example(actions=["samples", "cancel", "stop", "step"])
def test_every_request_ends_once_whatever_happens(engine, session, actions):
    alive, lasts, open_samples, cancelled = [], {}, {}, set()

    def note(events):
        for event in events:
            lasts[event.request] += event.last
            if event.finished is not None:
                open_samples[event.request].remove(event.sample)

    for place, action in enumerate(actions):
        match action:
            case "add" | "samples":
                params = SamplingParams(max_tokens=1 + place % 7, n=1 if action == "add" else 2, temperature=1.0)
                identity = engine.add(Request(PROMPTS[place % 4], params))
                alive.append(identity)
                lasts[identity], open_samples[identity] = 0, set(range(params.samples))
            case "cancel" if alive:
                engine.cancel(alive[place % len(alive)])
                cancelled.add(alive[place % len(alive)])  # its events wait for the next step: nothing is left to stop
            case "stop" if alive and open_samples[one := alive[place % len(alive)]] == {0, 1} and one not in cancelled:
                # Sample 0 goes on, and brings the last event; who stops all that is left gets none.
                engine.stop(one, 1)
                open_samples[one].discard(1)
            case "step":
                note(engine.step())
    while engine.busy:
        note(engine.step())
    assert set(lasts.values()) <= {1}
    assert not any(open_samples.values())
    wait_until(lambda: not session.engine.busy)
    session.engine.check()


class Offers:
    @hookimpl
    def register_backends(self):
        return {"batching": BatchingTorch}


def with_runtime():
    plugins = Plugins.load(third_party=False)
    plugins.register(Offers(), "a runtime that batches by itself")
    return plugins


@pytest.fixture(scope="module")
def artifact(published, tiny_llama):
    recipe = {"backend": {"batching": {}}, "batching": {"static": {}}}
    limits = {"max_batch_size": 3, "max_length": 96}
    return published("batching", recipe, partial(_saved, tiny_llama), tags=["task:causal-lm"], **limits)


def _saved(tiny_llama, folder):
    folder.mkdir()
    save_folder(tiny_llama(), folder)


def test_the_offline_api_runs_an_artifact_of_it(artifact, weights):
    with LLM(artifact, plugins=with_runtime()) as llm:
        found = [completion.samples[0].tokens for completion in llm.generate(list(PROMPTS), LONG)]
    assert found == [tuple(tokens(expected(weights, Request(prompt, LONG)))) for prompt in PROMPTS]
    with pytest.raises(RecipeError, match=r"batches by itself and takes no guesses; leave out --draft"):
        LLM(artifact, plugins=with_runtime(), speculation=Speculation())


def test_many_tasks_share_it_and_leave_when_they_like(artifact, weights):
    async def first(llm, prompt):
        async for delta in llm.stream(prompt, LONG):
            return delta.tokens
        return ()

    async def main():
        async with AsyncLLM(artifact, plugins=with_runtime()) as llm:
            whole, *begun = await asyncio.gather(
                llm.generate(PROMPTS[0], LONG), *(first(llm, prompt) for prompt in PROMPTS)
            )
            open_still = await llm.submit(PROMPTS[2], LONG)
            async for _ in open_still:
                break
        return whole, begun, [delta async for delta in open_still]

    whole, begun, rest = asyncio.run(main())
    assert whole.samples[0].tokens == tuple(tokens(expected(weights, Request(PROMPTS[0], LONG))))
    assert all(begun)
    assert rest[-1].finished == "cancelled"
