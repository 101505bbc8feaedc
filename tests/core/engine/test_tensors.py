"""The engine of one-step models: every sequence gets its own output, whatever is batched with it or fails beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from threading import Event, Semaphore

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.backends import TensorSession
from optkit.batching import Batcher, Schedule, Share, Wait
from optkit.engine.tensors import NOT_FINITE, TensorEngine, padded
from optkit.errors import OptkitError, RecipeError, RequestError
from optkit.steps import Limits, TensorSpec
from optkit_batching.bucketed import Bucketed
from optkit_batching.continuous import Continuous
from optkit_batching.dynamic import Dynamic
from optkit_batching.static import Static

VOCABULARY = 50
STRATEGIES = {
    "static": Static(max_batch_size=4),
    "dynamic": Dynamic(max_batch_size=4, max_queue_delay_ms=5),
    "bucketed": Bucketed(max_batch_size=4),
    "continuous": Continuous(max_batch_size=4, max_step_tokens=40),
}


class ScriptedEncoder(TensorSession):
    """An encoder without weights: a token's vector holds the token, its position and the sum of its sequence."""

    def __init__(
        self,
        fault: Callable[[list[int]], Exception | None] = lambda ids: None,
        poison: Callable[[list[int]], bool] = lambda ids: False,
        types: bool = False,
    ) -> None:
        names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
        self.inputs = dict.fromkeys(names, TensorSpec("int64", (None, None)))
        self.outputs = {"last_hidden_state": TensorSpec("float32", (None, None, 3))}
        self.batches: list[tuple[int, int]] = []
        self._fault, self._poison = fault, poison

    def run(self, inputs):
        assert inputs.keys() == self.inputs.keys()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        assert ids.dtype == mask.dtype == np.int64
        assert (ids[mask == 0] == 0).all()
        lengths = mask.sum(axis=1)
        assert (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all(), "padding is on the right"
        assert lengths.max() == ids.shape[1], "no wider than the longest"
        self.batches.append(ids.shape)
        rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        for row in rows:
            error = self._fault(row)
            if error is not None:
                raise error
        hidden = np.full((*ids.shape, 3), np.nan, np.float32)  # nobody may look at padding
        for place, row in enumerate(rows):
            hidden[place, : len(row)] = expected(row)
            if self._poison(row):
                hidden[place, 0, 1] = np.inf
        return {"last_hidden_state": hidden}

    def close(self) -> None:
        self.batches.clear()


def expected(ids):
    return np.array([[token, place, sum(ids)] for place, token in enumerate(ids)], np.float32)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def engine_of(session, batcher=STRATEGIES["static"], max_length=32, clock=None):
    limits = Limits(batcher.max_sequences, max_length)
    return TensorEngine(session, batcher, limits, VOCABULARY, clock=clock or Clock())


def drained(engine, clock):
    """Everything that comes, at the moments that the engine asks for."""
    ended = []
    while engine.busy:
        ended += engine.step()
        clock.now += engine.wait or 0.0
    return {one.request: one for one in ended}


SEQUENCES = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=32).map(tuple), max_size=25)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("name", STRATEGIES)
@given(sequences=SEQUENCES, types=st.booleans())
def test_every_sequence_gets_its_own_output(name, streams, sequences, types):
    clock, session = Clock(), ScriptedEncoder(types=types)
    session.streams = streams
    engine = engine_of(session, STRATEGIES[name], clock=clock)
    requests = {engine.add(ids): ids for ids in sequences}
    ended = drained(engine, clock)
    assert ended.keys() == requests.keys()
    for request, ids in requests.items():
        assert ended[request].finished == "done"
        np.testing.assert_array_equal(ended[request].result, expected(ids))
    assert all(rows <= 4 for rows, _ in session.batches)
    stats = engine.stats
    assert (stats.requests, stats.steps) == (len(sequences), len(session.batches))
    assert stats.tokens == sum(map(len, sequences))
    assert stats.tokens + stats.padding == sum(rows * width for rows, width in session.batches)


@pytest.mark.parametrize("streams", [1, 3])
@given(sequences=SEQUENCES, wrong=st.sets(st.integers(0, 24)), poisoned=st.sets(st.integers(0, 24)))
def test_only_what_cannot_be_computed_fails(streams, sequences, wrong, poisoned):
    def among(places):
        chosen = {sequences[place] for place in places if place < len(sequences)}
        return lambda ids: tuple(ids) in chosen

    fails, is_poisoned = among(wrong), among(poisoned)
    session = ScriptedEncoder(lambda ids: ValueError("odd") if fails(ids) else None, is_poisoned)
    session.streams = streams
    clock = Clock()
    engine = engine_of(session, clock=clock)
    requests = {engine.add(ids): ids for ids in sequences}
    ended = drained(engine, clock)
    assert ended.keys() == requests.keys()
    for request, ids in requests.items():
        error = "ValueError: odd" if fails(ids) else NOT_FINITE if is_poisoned(ids) else ""
        assert (ended[request].finished, ended[request].error) == ("error" if error else "done", error)
        assert (ended[request].result is None) == bool(error)


def test_a_cancelled_request_ends_without_being_computed():
    session = ScriptedEncoder()
    engine = engine_of(session)
    first, second = engine.add((1, 2)), engine.add((3,))
    engine.cancel(first)
    engine.cancel(first)
    engine.cancel(99)
    assert {one.request: one.finished for one in engine.step()} == {first: "cancelled", second: "done"}
    assert session.batches == [(1, 1)]
    engine.cancel(second)
    assert not engine.busy
    assert engine.step() == []


def test_cancelling_the_last_one_is_told_without_a_batch():
    engine = engine_of(ScriptedEncoder())
    request = engine.add((1,))
    engine.cancel(request)
    assert engine.busy
    assert [one.finished for one in engine.step()] == ["cancelled"]
    assert not engine.busy


def test_it_says_how_long_to_wait_for_company():
    clock = Clock()
    engine = engine_of(ScriptedEncoder(), Dynamic(max_batch_size=2, max_queue_delay_ms=100), clock=clock)
    engine.add((1, 2))
    assert engine.step() == []
    assert engine.wait == pytest.approx(0.1)
    clock.now += 0.04
    assert engine.step() == []
    assert engine.wait == pytest.approx(0.06)
    engine.add((3,))
    assert len(engine.step()) == 2
    assert engine.wait is None


def test_what_could_never_be_encoded_is_refused():
    engine = engine_of(ScriptedEncoder(), max_length=4)
    for ids, words in (
        ((), "no tokens to encode"),
        ((1,) * 5, "5 tokens to encode, a sequence can have 4"),
        ((1, VOCABULARY), "outside 0 to 49"),
        ((-1,), "outside 0 to 49"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.add(ids)
    assert not engine.busy


def test_a_strategy_that_cuts_sequences_computes_only_whole_ones():
    clock, session = Clock(), ScriptedEncoder()
    engine = engine_of(session, Continuous(max_batch_size=4, max_step_tokens=10), clock=clock)
    for length in (4, 5, 8):
        engine.add((1,) * length)
    assert [len(one.result) for one in engine.step()] == [4, 5]  # one token of the third was left
    assert [len(one.result) for one in engine.step()] == [8]
    engine.add((1,) * 11)
    with pytest.raises(RecipeError, match=r"Continuous gives a model of one step 10 of 11 tokens .* raise its limit"):
        engine.step()


class Idle(Batcher):
    @property
    def max_sequences(self):
        return 1

    def plan(self, waiting, running, memory, now):
        return Wait(None)


class Greedy(Idle):
    def plan(self, waiting, running, memory, now):
        return Schedule(tuple(Share(one.id, one.sequences[0].pending) for one in waiting))


def test_a_strategy_that_does_what_it_must_not_is_named():
    engine = engine_of(ScriptedEncoder(), Idle())
    engine.add((1,))
    with pytest.raises(OptkitError, match="Idle waits for ever with 1 requests waiting"):
        engine.step()
    engine = engine_of(ScriptedEncoder(), Greedy())
    engine.add((1,))
    engine.add((2,))
    with pytest.raises(RecipeError, match="Greedy gives a model of one step 2 rows"):
        engine.step()


def test_another_kind_of_model_is_refused():
    session = ScriptedEncoder()
    session.inputs = {"pixel_values": TensorSpec("float32", (None, 3, 224, 224))}
    with pytest.raises(OptkitError, match=r"no text encoder: it maps \['pixel_values'\]"):
        engine_of(session)


def test_inputs_are_padded_to_the_longest():
    arrays = padded([(5, 6, 7), (8,)], ("input_ids", "attention_mask", "token_type_ids"))
    assert arrays["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert not arrays["token_type_ids"].any()


class Gated(ScriptedEncoder):
    """Whose calls end when the test says so; the first token of a batch names its call."""

    streams = 2

    def __init__(self):
        super().__init__()
        self.begun, self.gates = Semaphore(0), defaultdict(Event)

    def run(self, inputs):
        self.begun.release()
        assert self.gates[int(inputs["input_ids"][0, 0])].wait(60)
        return super().run(inputs)


def test_calls_run_at_the_same_time_and_each_is_given_out_as_it_ends():
    session = Gated()
    engine = engine_of(session, Static(max_batch_size=1))
    first, second, third = (engine.add((token,)) for token in (1, 2, 3))
    session.gates[2].set()
    assert [one.request for one in engine.step()] == [second]  # the first still runs
    assert session.begun.acquire(timeout=60)
    assert session.begun.acquire(timeout=60)
    engine.cancel(first)
    session.gates[3].set()
    assert {(one.request, one.finished) for one in engine.step()} == {(first, "cancelled"), (third, "done")}
    assert not engine.busy
    # What was cancelled ends unseen, and the engine goes on.
    session.gates[1].set()
    fourth = engine.add((3, 4))
    ended = [*engine.step(), *(engine.step() if engine.busy else ())]
    assert [(one.request, one.finished) for one in ended] == [(fourth, "done")]
    assert engine.stats.steps in (3, 4)  # whether the cancelled call was looked at already
