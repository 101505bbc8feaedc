"""The engine of arrays: every request gets what it gets alone, whatever shares a call with it or fails beside it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.backends import TensorSession
from optkit.engine.arrays import ArrayEngine
from optkit.errors import RequestError
from optkit.steps import Limits, TensorSpec
from optkit_batching.bucketed import Bucketed
from optkit_batching.continuous import Continuous
from optkit_batching.dynamic import Dynamic
from optkit_batching.static import Static

ROWS = 4
STRATEGIES = {
    "static": Static(max_batch_size=ROWS),
    "dynamic": Dynamic(max_batch_size=ROWS, max_queue_delay_ms=5),
    "bucketed": Bucketed(max_batch_size=ROWS),
    "continuous": Continuous(max_batch_size=ROWS, max_step_tokens=ROWS),
}


class Weighing(TensorSession):
    """Sums each row of `x` and multiplies it by the row's `w`; a row that holds a bad number cannot be computed."""

    def __init__(self, bad=frozenset()):
        self.inputs = {"x": TensorSpec("float32", (None, None)), "w": TensorSpec("int64", (None, 1))}
        self.outputs = {"y": TensorSpec("float32", (None,)), "echo": TensorSpec("float32", (None, None))}
        self.calls: list[tuple[int, int]] = []
        self._bad = bad

    def run(self, inputs):
        x, w = inputs["x"], inputs["w"]
        assert x.flags.writeable
        assert len(x) == len(w) <= ROWS
        if not self._bad.isdisjoint(x.ravel().tolist()):
            raise ValueError("odd")
        self.calls.append(x.shape)
        return {"y": x.sum(axis=1) * w[:, 0], "echo": x}

    def close(self):
        self.calls.clear()


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def engine_of(session, batcher=STRATEGIES["static"], **options):
    return ArrayEngine(session, batcher, Limits(batcher.max_sequences, 32), **options)


def drained(engine, clock):
    ended = []
    while engine.busy:
        ended += engine.step()
        clock.now += engine.wait or 0.0
    return ended


def request(numbers, weight):
    x = np.array(numbers, np.float32)
    x.flags.writeable = False
    return {"x": x, "w": np.full((len(x), 1), weight)}


REQUESTS = st.integers(1, 3).flatmap(
    lambda width: st.builds(
        request,
        st.lists(st.lists(st.integers(0, 9), min_size=width, max_size=width), min_size=1, max_size=ROWS),
        st.integers(-3, 3),
    )
)


@pytest.mark.parametrize("name", STRATEGIES)
@given(
    arrivals=st.lists(st.lists(REQUESTS, max_size=8), max_size=4),
    bad=st.sets(st.integers(0, 9), max_size=2),
    cancelled=st.sets(st.integers(0, 31), max_size=4),
)
def test_every_request_has_one_end_and_it_is_the_one_it_has_alone(name, arrivals, bad, cancelled):
    clock, session = Clock(), Weighing(bad)
    engine = engine_of(session, STRATEGIES[name], clock=clock)
    asked, ended = {}, []
    for group in arrivals:
        for inputs in group:
            asked[engine.add(inputs)] = inputs
        for identity in cancelled:
            engine.cancel(identity)
        ended += engine.step()
        clock.now += 0.001
    ended += drained(engine, clock)
    assert sorted(one.request for one in ended) == sorted(asked)
    for one in ended:
        inputs = asked[one.request]
        try:
            alone = Weighing(bad).run({key: array.copy() for key, array in inputs.items()})
        except ValueError:
            assert (one.finished, one.error) in [("error", "ValueError: odd"), ("cancelled", "")]
            continue
        assert one.finished == "done" or (one.finished == "cancelled" and one.request in cancelled)
        if one.result is not None:
            assert one.result.keys() == alone.keys()
            for key, array in alone.items():
                np.testing.assert_array_equal(one.result[key], array)
    stats = engine.stats
    assert (stats.steps, stats.requests, stats.waiting) == (len(session.calls), len(asked), 0)
    assert stats.rows == sum(rows for rows, _ in session.calls)


@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_shapes_share_calls_and_others_have_their_own(name):
    clock, session = Clock(), Weighing()
    engine = engine_of(session, STRATEGIES[name], clock=clock)
    for numbers in ([[1]], [[1, 2]], [[3], [4]], [[3, 4]], [[5]], [[6]]):
        engine.add(request(numbers, 1))
        clock.now += 1e-4
    assert all(one.finished == "done" for one in drained(engine, clock))
    assert session.calls == [(4, 1), (2, 2), (1, 1)] if name != "dynamic" else [(4, 1), (1, 1), (2, 2)]


def test_it_says_how_long_to_wait_for_company_of_any_shape():
    clock = Clock()
    engine = engine_of(Weighing(), Dynamic(max_batch_size=2, max_queue_delay_ms=100), clock=clock)
    engine.add(request([[1]], 1))
    clock.now += 0.03
    engine.add(request([[1, 2]], 1))
    assert engine.step() == []
    assert engine.wait == pytest.approx(0.07)
    engine.add(request([[1, 2]], 1))  # this shape is full first
    assert len(engine.step()) == 2
    clock.now += 0.08
    assert len(engine.step()) == 1


X, W = np.zeros((2, 3), np.float32), np.ones((2, 1), np.int64)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": X}, r"the input 'w' is missing; the model takes x, w"),
        ({"x": X, "w": W, "z": X}, r"there is no input 'z'; the model takes x, w"),
        ({"x": X.astype(float), "w": W}, "x: is float64, the model takes float32"),
        ({"x": X, "w": W.astype(">i8")}, "w: is >i8, the model takes int64"),
        ({"x": X[0], "w": W}, r"x: has shape \[3\], the model takes \[any, any\]"),
        ({"x": X, "w": np.ones((2, 2), np.int64)}, r"w: has shape \[2, 2\], the model takes \[any, 1\]"),
        ({"x": np.float32(1), "w": W}, r"x: has shape \[\], the model takes"),
        ({"x": X[:1], "w": W}, r"differ in their first axis, the batch, found \[1, 2\]"),
        ({"x": X[:0], "w": W[:0]}, "there are 0 rows in the batch, it can have 1 to 4; send another number"),
        (
            {"x": np.repeat(X, 3, 0), "w": np.repeat(W, 3, 0)},
            "there are 6 rows in the batch, it can have 1 to 4; send s",
        ),
    ],
)
def test_what_the_model_does_not_take_is_refused(inputs, words):
    engine = engine_of(Weighing())
    with pytest.raises(RequestError, match=words):
        engine.add(inputs)
    assert not engine.busy


class Echo(TensorSession):
    def __init__(self, output):
        self.inputs = dict.fromkeys(("input_ids", "attention_mask"), TensorSpec("int64", (None, None)))
        self.outputs = {"y": TensorSpec("int64", (None,))}
        self._output = output

    def run(self, inputs):
        return {"y": self._output(inputs["input_ids"])}

    def close(self):
        pass


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([[50]], [[1]], "input_ids: there are values outside 0 to 49"),
        ([[-1]], [[1]], "input_ids: there are values outside 0 to 49"),
        ([[1]], [[2]], "attention_mask: there are values outside 0 to 1"),
        ([[1] * 33], [[1] * 33], "the sequences have 33 tokens, they can have 1 to 32"),
        ([[]], [[]], "the sequences have 0 tokens"),
        ([[1, 2]], [[1]], r"the inputs differ in shape, found \[\(1, 1\), \(1, 2\)\]"),
    ],
)
def test_tokens_that_a_text_encoder_does_not_have_are_refused(ids, mask, words):
    engine = engine_of(Echo(lambda ids: ids[:, 0]), bounds={"input_ids": 50, "attention_mask": 2, "token_type_ids": 2})
    with pytest.raises(RequestError, match=words):
        engine.add({"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)})


def test_an_output_that_is_not_one_row_for_each_fails_its_requests():
    engine = engine_of(Echo(lambda ids: ids.sum()))
    ids = np.ones((1, 2), np.int64)
    requests = [engine.add({"input_ids": ids, "attention_mask": ids}) for _ in range(2)]
    ended = engine.step()
    assert [one.request for one in ended] == requests
    assert {one.error for one in ended} == {"OptkitError: the output 'y' has shape () for 1 rows"}
