"""The engine on a scripted session: every strategy gives what each request gets alone, and no block is lost."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.batching import Batcher, Schedule, Share, Wait
from optkit.engine import Engine, Event, Request, SamplingParams, Structure
from optkit.engine.speculation import DraftModel, PromptLookup
from optkit.errors import OptkitError, RequestError
from optkit.testing import ScriptedSession
from optkit_batching.bucketed import Bucketed
from optkit_batching.continuous import Continuous
from optkit_batching.dynamic import Dynamic
from optkit_batching.static import Static

VOCABULARY = 17
END = 5


def drain(engine: Engine) -> dict[int, dict[int, list[int]]]:
    """Tokens by request and sample; asserts that each request ends once, and well."""
    output: dict[int, dict[int, list[int]]] = {}
    ended: set[int] = set()
    while engine.busy:
        for event in engine.step():
            assert event.request not in ended, "an event after the last one"
            assert not event.error
            if event.token is not None:
                output.setdefault(event.request, {}).setdefault(event.sample, []).append(event.token)
            if event.last:
                ended.add(event.request)
        engine.check()
    return output


def alone(request: Request) -> dict[int, list[int]]:
    engine = Engine(ScriptedSession(64, 4, max_length=60), Static(max_batch_size=4), end_tokens=(END,))
    identity = engine.add(request)
    return drain(engine)[identity]


def run(requests: list[Request], batcher: Batcher, session: ScriptedSession, **options: object) -> tuple[Engine, list]:
    now = iter(range(10**6))
    engine = Engine(session, batcher, end_tokens=(END,), clock=lambda: float(next(now)), **options)  # type: ignore[arg-type]
    ids = [engine.add(request) for request in requests]
    output = drain(engine)
    return engine, [output[identity] for identity in ids]


requests = st.lists(
    st.builds(
        Request,
        prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20).map(tuple),
        params=st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 20),
            temperature=st.sampled_from([0.0, 0.7]),
            top_k=st.sampled_from([0, 3]),
            repetition_penalty=st.sampled_from([1.0, 1.5]),
            frequency_penalty=st.sampled_from([0.0, 0.5]),
            seed=st.integers(0, 3),
            stop_token_ids=st.sampled_from([(), (3,)]),
            ignore_eos=st.booleans(),
            n=st.sampled_from([1, 1, 2, 3]),
        ),
        priority=st.integers(-2, 2),
        salt=st.sampled_from(["", "a"]),
    ),
    max_size=8,
)
batchers = st.one_of(
    st.builds(Static, max_batch_size=st.integers(3, 5)),
    st.builds(Bucketed, max_batch_size=st.integers(3, 5)),
    st.builds(Dynamic, max_batch_size=st.integers(3, 5)),
    st.builds(
        Continuous,
        max_batch_size=st.integers(3, 5),
        max_step_tokens=st.integers(5, 24),
        order=st.sampled_from(["fcfs", "priority", "shortest_prompt"]),
        admission=st.sampled_from(["reserve_full", "reserve_prompt", "watermark", "none"]),
        preemption=st.sampled_from(["recompute", "swap"]),
        prefix_cache=st.booleans(),
    ),
)
drafters = st.sampled_from(
    [
        lambda: None,
        lambda: PromptLookup(tokens=3, longest=2, shortest=1),
        lambda: DraftModel(ScriptedSession(20, 4, max_length=60), tokens=3),  # the model itself: always right
        lambda: DraftModel(ScriptedSession.slots(2, 30), tokens=2),
    ]
)


@settings(max_examples=300)
@given(requests=requests, batcher=batchers, drafter=drafters, kv=st.sampled_from(["paged", "slot"]))
def test_output_is_that_of_each_request_alone_whatever_the_strategy(requests, batcher, drafter, kv):
    # 30 blocks of 4 hold the largest request, 3 samples of 40 tokens, and little more.
    session = ScriptedSession(30, 4, max_length=60) if kv == "paged" else ScriptedSession.slots(5, 60)
    engine, output = run(requests, batcher, session, drafter=drafter())
    assert output == [alone(request) for request in requests]
    if isinstance(batcher, Continuous) and batcher.admission == "reserve_full":
        assert engine.stats.recomputed + engine.stats.swapped == 0


def workload(count: int, seed: int = 0) -> list[Request]:
    draw = random.Random(seed)
    return [
        Request(
            tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 20))),
            SamplingParams(
                max_tokens=draw.randint(1, 20), ignore_eos=True, temperature=draw.choice([0.0, 1.0]), seed=i
            ),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("admission", ["reserve_full", "reserve_prompt", "watermark", "none"])
def test_four_times_oversubscribed_every_request_ends_with_its_full_output(admission, preemption):
    requests = workload(64)
    wanted = sum(-(-(len(one.prompt) + one.params.max_tokens) // 4) for one in requests)
    session = ScriptedSession(blocks=wanted // 4 // 4, block_size=4, max_length=60, max_batch_size=64)
    batcher = Continuous(max_batch_size=64, admission=admission, preemption=preemption, prefix_cache=False)
    assert wanted >= 4 * session.caps.blocks
    engine, output = run(requests, batcher, session)
    assert [len(one[0]) for one in output] == [one.params.max_tokens for one in requests]
    assert output == [alone(request) for request in requests]
    evicted = engine.stats.recomputed, engine.stats.swapped
    if admission == "reserve_full":
        assert evicted == (0, 0)
    elif admission == "none":
        assert (evicted[0] > 0, evicted[1] > 0) == (preemption == "recompute", preemption == "swap")


def test_a_prefix_in_the_cache_is_computed_once():
    prompt = tuple(range(16)) * 2
    requests = [Request((*prompt, i), SamplingParams(max_tokens=4, ignore_eos=True)) for i in range(4)]
    engine, output = run(requests, Continuous(max_batch_size=1), ScriptedSession(30, 4, max_length=60))
    assert output == [alone(request) for request in requests]
    assert engine.stats.cached_tokens == 3 * 32
    assert engine.stats.prompt_tokens == 33 + 3 * 1
    cold, same = run(requests, Continuous(max_batch_size=1, prefix_cache=False), ScriptedSession(30, 4, max_length=60))
    assert (same, cold.stats.cached_tokens, cold.stats.prompt_tokens) == (output, 0, 4 * 33)


def test_tenants_do_not_share_prefixes():
    requests = [Request((1,) * 20, SamplingParams(max_tokens=2), salt=salt) for salt in ("a", "b", "a")]
    engine, _ = run(requests, Continuous(max_batch_size=1), ScriptedSession(30, 4, max_length=60))
    assert engine.stats.cached_tokens == 16


def test_the_cache_gives_up_what_was_unused_longest():
    def ask(token: int) -> Request:
        return Request((token,) * 9, SamplingParams(max_tokens=1))

    engine = Engine(ScriptedSession(8, 4, max_length=16), Continuous(max_batch_size=1))
    for token in (1, 2, 3, 1, 4):  # each keeps two blocks of eight; 4 takes the last one of 2
        engine.add(ask(token))
        drain(engine)
    before = engine.stats.cached_tokens
    for token in (1, 3):
        engine.add(ask(token))
        drain(engine)
    assert engine.stats.cached_tokens - before == 16
    engine.add(ask(2))
    drain(engine)
    assert engine.stats.cached_tokens - before == 16 + 4


def test_samples_share_the_blocks_of_their_prompt():
    session = ScriptedSession(16, 4)
    engine = Engine(session, Continuous(max_batch_size=8))
    engine.add(Request((1,) * 30, SamplingParams(max_tokens=4, n=4, temperature=1.0, ignore_eos=True)))
    engine.step()
    assert engine.stats.used_blocks == 8, "one prompt"
    engine.step()
    assert engine.stats.used_blocks == 7 + 4, "each writes to a copy of the last block"
    drain(engine)
    assert engine.stats.used_blocks == 0


def test_a_raising_step_fails_only_the_request_that_cannot_be_computed():
    requests = workload(12)
    session = ScriptedSession(
        120,
        4,
        max_length=60,
        max_batch_size=12,
        fault=lambda row: MemoryError("too much") if 13 in row.tokens else None,
    )
    engine = Engine(session, Continuous(max_batch_size=12))
    ids = [engine.add(request) for request in requests]
    last = {event.request: event for event in events(engine) if event.last}
    for identity, request in zip(ids, requests, strict=True):
        meets = 13 in request.prompt or 13 in alone(request)[0][:-1]
        assert last[identity].finished == ("error" if meets else "length")
        assert last[identity].error == ("MemoryError: too much" if meets else "")
    assert {event.finished for event in last.values()} == {"error", "length"}
    assert engine.stats.used_blocks == 0


def test_blocks_of_a_request_that_fails_while_a_step_is_made_are_not_written_to():
    """Its first sample is in the step already when the second cannot get a copy of their last block."""
    session = ScriptedSession(12, 4, max_length=40)
    session.copy_blocks = lambda pairs: (_ for _ in ()).throw(MemoryError("no copy"))
    forked = Request((1, 2, 3, 4, 5), SamplingParams(max_tokens=12, n=2, temperature=1.0, seed=1, ignore_eos=True))
    other = Request((6,) * 7, SamplingParams(max_tokens=12, ignore_eos=True))
    engine = Engine(session, Continuous(admission="none", prefix_cache=False))
    ids = [engine.add(one) for one in (forked, other)]
    found = events(engine)
    assert {event.error for event in found if event.request == ids[0] and event.finished} == {"MemoryError: no copy"}
    assert [event.token for event in found if event.request == ids[1]] == alone(other)[0]


def test_a_request_that_cannot_be_swapped_in_fails_alone_and_loses_no_block():
    session = ScriptedSession(14, 4, max_length=40)
    write, failures = session.write_blocks, iter([True])

    def fail_once(blocks, contents):
        if next(failures, False):
            raise OSError("no way back")
        write(blocks, contents)

    session.write_blocks = fail_once
    engine = Engine(session, Continuous(admission="none", preemption="swap", prefix_cache=False))
    requests = [Request((n,) * 5, SamplingParams(max_tokens=20, ignore_eos=True)) for n in range(4)]
    ids = [engine.add(request) for request in requests]
    found = events(engine)
    failed = [event.request for event in found if event.error]
    assert len(failed) == 1
    for identity, request in zip(ids, requests, strict=True):
        if identity not in failed:
            assert [event.token for event in found if event.request == identity] == alone(request)[0]
    engine.check()


def test_a_guesser_that_breaks_only_costs_its_guesses(caplog):
    class Broken(PromptLookup):
        def propose(self, sequences, room):
            raise RuntimeError("out of luck")

    requests = workload(3)
    _, output = run(requests, Continuous(), ScriptedSession(60, 4, max_length=60), drafter=Broken())
    assert output == [alone(request) for request in requests]
    assert [record.message for record in caplog.records] == [
        "no tokens are guessed from here on: RuntimeError: out of luck"
    ]


def test_a_row_of_nan_fails_alone():
    bad, good = Request((1, 2), SamplingParams(max_tokens=6, ignore_eos=True)), workload(3)
    session = ScriptedSession(60, 4, max_length=60, poison=lambda row: row.sequence == 0 and row.computed >= 3)
    engine = Engine(session, Continuous())
    ids = [engine.add(request) for request in (bad, *good)]
    found = list(events(engine))
    first = [event for event in found if event.request == ids[0]]
    assert [event.token for event in first[:-1]] == alone(bad)[0][:2]
    assert (first[-1].finished, first[-1].error) == ("error", "the model gave NaN or infinite logits")
    for identity, request in zip(ids[1:], good, strict=True):
        assert [event.token for event in found if event.request == identity] == alone(request)[0]


def test_an_interrupt_leaves_everything_as_it_was():
    interrupts = iter([None, None, KeyboardInterrupt()])
    session = ScriptedSession(60, 4, max_length=60)
    execute = session.execute

    def interrupted(plan):
        error = next(interrupts, None)
        if error is not None:
            raise error
        return execute(plan)

    session.execute = interrupted
    requests = workload(4)
    engine = Engine(session, Continuous())
    ids = [engine.add(request) for request in requests]
    got: dict[int, list[int]] = {identity: [] for identity in ids}
    with pytest.raises(KeyboardInterrupt):
        while True:
            for event in engine.step():
                got[event.request].append(event.token)
    engine.check()
    for identity, more in drain(engine).items():
        got[identity] += more[0]
    assert [got[identity] for identity in ids] == [alone(request)[0] for request in requests]


def events(engine: Engine) -> list[Event]:
    found = []
    while engine.busy:
        found += engine.step()
    return found


def test_ends_at_end_tokens_at_stop_tokens_and_at_the_length():
    def ended(**params):
        engine = Engine(ScriptedSession(), Static(), end_tokens=(END,))
        *_, last = engine.stream(Request((1, 2), SamplingParams(max_tokens=20, **params)))
        return last.finished

    free = alone(Request((1, 2), SamplingParams(max_tokens=20, ignore_eos=True)))[0]
    assert ended(ignore_eos=True) == "length"
    assert ended(ignore_eos=True, stop_token_ids=(free[3],)) == "stop"


def test_a_late_request_ends_with_what_it_has():
    now = [0.0]
    engine = Engine(ScriptedSession(), Continuous(max_batch_size=1), clock=lambda: now[0])
    running = engine.add(Request((1,), SamplingParams(max_tokens=20, ignore_eos=True), timeout=5.0))
    waiting = engine.add(Request((2,), SamplingParams(max_tokens=20, ignore_eos=True), timeout=2.0))
    found = []
    while engine.busy:
        found += engine.step()
        now[0] += 1
    ends = {event.request: (event.token, event.finished) for event in found if event.last}
    assert ends == {running: (None, "deadline"), waiting: (None, "deadline")}
    assert sum(event.request == running for event in found) == 5 + 1


def test_requests_that_end_in_time_leave_no_deadline_behind():
    engine = Engine(ScriptedSession(), Continuous(max_batch_size=4))
    for _ in range(500):
        engine.add(Request((1,), SamplingParams(max_tokens=1, ignore_eos=True), timeout=600.0))
        while engine.busy:
            engine.step()
    assert not engine._deadlines


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "the prompt is empty"),
        (Request((17,)), "token ids outside 0 to 16"),
        (Request((1,), SamplingParams(logit_bias={-1: 1.0})), "logit_bias or stop_token_ids hold token ids outside"),
        (
            Request((1,) * 30, SamplingParams(max_tokens=20)),
            "a prompt of 30 tokens and 20 output tokens make 50, a sequence can have 40",
        ),
        (
            Request((1,) * 30, SamplingParams(max_tokens=10, n=4)),
            "a prompt of 30 tokens and 4 times 10 output tokens need 19 blocks of 4 tokens, the KV cache has 16",
        ),
        (Request((1,), SamplingParams(max_tokens=1, n=9)), "9 samples run at once, and the batch holds 8 sequences"),
        (Request((1,), SamplingParams(max_tokens=1), priority=101), "priority is from -100 to 100"),
        (
            Request((1,), SamplingParams(max_tokens=1, structure=Structure(regex="a"))),
            "structured output needs the model's tokenizer",
        ),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_figures(request_, message):
    engine = Engine(ScriptedSession(16, 4, max_length=40), Continuous())
    with pytest.raises(RequestError) as caught:
        engine.add(request_)
    assert message in str(caught.value)
    assert not engine.busy


def test_an_aged_request_is_served_though_more_urgent_ones_keep_coming():
    now = [0.0]
    engine = Engine(
        ScriptedSession(), Continuous(max_batch_size=1, order="priority", patience_s=10), clock=lambda: now[0]
    )
    patient = engine.add(Request((1,), SamplingParams(max_tokens=2, ignore_eos=True), priority=1))
    ended = None
    for _ in range(200):
        engine.add(Request((2,), SamplingParams(max_tokens=2, ignore_eos=True), priority=0))
        for event in (*engine.step(), *engine.step()):
            if event.last and event.request == patient:
                ended = now[0]
        now[0] += 1
    assert ended is not None
    assert 10 <= ended <= 25


def test_ten_thousand_requests_with_random_cancels_each_end_once():
    draw = random.Random(1)
    session = ScriptedSession(200, 4, max_length=16, max_batch_size=64, vocab_size=3)
    engine = Engine(session, Continuous(max_batch_size=64, admission="none"), end_tokens=(2,))
    alive: list[int] = []
    ends: dict[int, int] = {}
    added = 0
    while added < 10_000 or engine.busy:
        for _ in range(draw.randint(0, 40) if added < 10_000 else 0):
            prompt = tuple(draw.randrange(3) for _ in range(draw.randint(1, 8)))
            alive.append(
                engine.add(Request(prompt, SamplingParams(max_tokens=draw.randint(1, 8), n=draw.choice([1, 1, 2]))))
            )
            added += 1
        for _ in range(draw.randint(0, 8)):
            if alive:
                engine.cancel(draw.choice(alive))
        for event in engine.step():
            ends[event.request] = ends.get(event.request, 0) + event.last
        if len(alive) > 500:
            alive = [one for one in alive if not ends.get(one)]
    assert len(ends) == added >= 10_000
    assert set(ends.values()) == {1}
    assert engine.stats.used_blocks == 0
    engine.check()


class Reckless(Batcher):
    @property
    def max_sequences(self) -> int:
        return 8

    def plan(self, waiting, running, memory, now) -> Schedule | Wait:
        everybody = [one for request in (*running, *waiting) for one in request.sequences]
        return Schedule(tuple(Share(one.id, one.pending) for one in everybody))


def test_a_strategy_that_promises_too_much_fails_requests_and_loses_no_block():
    requests = [Request((n,) * 14, SamplingParams(max_tokens=20, ignore_eos=True)) for n in range(4)]
    engine = Engine(ScriptedSession(11, 4, max_length=40), Reckless())
    ids = [engine.add(request) for request in requests]
    found = events(engine)
    ended = {event.request: event for event in found if event.last}
    assert [ended[identity].finished for identity in ids] == ["length", "error", "error", "error"]
    assert "blocks are needed and" in ended[ids[-1]].error
    assert [event.token for event in found if event.request == ids[0]] == alone(requests[0])[0]
    engine.check()


class WaitsForEver(Batcher):
    @property
    def max_sequences(self) -> int:
        return 1

    def plan(self, waiting, running, memory, now) -> Schedule | Wait:
        return Wait(None)


def test_a_strategy_that_waits_for_ever_is_a_bug_with_a_name():
    engine = Engine(ScriptedSession(), WaitsForEver())
    engine.add(Request((1,), SamplingParams(max_tokens=1)))
    with pytest.raises(OptkitError, match="WaitsForEver waits for ever with 1 requests waiting"):
        engine.step()


def test_log_probabilities_come_with_output_and_prompt():
    params = SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    for batcher in (Continuous(max_batch_size=2, max_step_tokens=4), Static()):
        engine = Engine(ScriptedSession(), batcher)
        first, *others = engine.stream(Request((1, 2, 3, 4, 5, 6, 7), params))
        assert first.prompt is not None
        assert [one.token for one in first.prompt.logprobs] == [2, 3, 4, 5, 6, 7]
        assert all(len(one.top) == 1 and one.top[0][1] >= one.logprob for one in first.prompt.logprobs)
        for event in (first, *others):
            assert event.logprob.token == event.token == event.logprob.top[0][0]
            assert len(event.logprob.top) == 2
        assert all(event.prompt is None for event in others)


def test_the_strategy_in_the_documentation_works():
    page = (Path(__file__).parents[3] / "docs" / "engine.md").read_text()
    names: dict[str, type[Batcher]] = {}
    exec(re.search(r"```python\n(from optkit.batching import.*?)```", page, re.DOTALL)[1], names)
    requests = workload(5)
    engine, output = run(requests, names["OneAtATime"](), ScriptedSession(30, 4, max_length=60))
    assert output == [alone(request) for request in requests]
    assert engine.stats.steps >= sum(request.params.max_tokens for request in requests)
