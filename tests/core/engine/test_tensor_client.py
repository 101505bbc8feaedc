"""Models of one step in a process of its own: whatever happens to it, requests end, and the next ones are served."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import psutil
import pytest

import optkit
from optkit.engine import supervision, wire
from optkit.engine.client import WorkerEngine
from optkit.engine.encoder import EncoderText
from optkit.engine.tensor_client import WorkerTensors
from optkit.errors import DamagedError, MachineError, RecipeError, RequestError
from optkit.steps import TensorSpec

ABORT, HANG, RAISE, LARGE = 310, 311, 312, 313
PATIENT = {"dynamic": {"max_batch_size": 8, "max_queue_delay_ms": 60_000}}
"""Waits for a full batch."""


def rows(*firsts):
    return {"x": np.array([[first, 1, 2] for first in firsts], np.float32)}


def doubled(outputs, inputs):
    np.testing.assert_array_equal(outputs["y"], 2 * inputs["x"])
    np.testing.assert_array_equal(outputs["sum"], inputs["x"].sum(axis=1))
    return True


def mean(ids):
    return [np.mean(ids), (len(ids) - 1) / 2, sum(ids)]


async def until_computing(worker):
    while not (await worker.health()).silent:
        await asyncio.sleep(0.005)


async def until_waiting(worker, count):
    while (await worker.stats()).waiting != count:
        await asyncio.sleep(0.005)
    return await worker.stats()


def test_it_says_what_it_serves(scripted_tensors, scripted_encoder):
    async def main():
        async with WorkerTensors(scripted_tensors()) as rows, WorkerTensors(scripted_encoder()) as texts:
            assert (rows.name, rows.max_length, rows.encoder) == ("tensors", 1, False)
            assert rows.inputs == {"x": TensorSpec("float32", (None, 3))}
            assert rows.outputs == {"y": TensorSpec("float32", (None, 3)), "sum": TensorSpec("float32", (None,))}
            assert (texts.name, texts.max_length, texts.encoder) == ("texts", 32, True)
            assert list(texts.inputs) == ["input_ids", "attention_mask"]
            health = await rows.health()
            assert (health.state, health.ok, health.restarts) == ("ready", True, 0)

    asyncio.run(main())


def test_concurrent_requests_share_calls(scripted_tensors):
    asked = [rows(*range(n, n + 1 + n % 3)) for n in range(4)]  # 1 + 2 + 3 + 1 rows

    async def main():
        async with WorkerTensors(scripted_tensors(**PATIENT)) as worker:
            found = await asyncio.gather(*(worker.infer(inputs) for inputs in [*asked, rows(9)]))
            return found, await worker.stats()

    found, stats = asyncio.run(main())
    assert all(doubled(outputs, inputs) for outputs, inputs in zip(found, [*asked, rows(9)], strict=True))
    assert found[0]["y"].flags.writeable
    assert (stats.steps, stats.requests, stats.rows, stats.waiting) == (1, 5, 8, 0)


def test_callers_share_batches_of_texts_and_rows_go_beside_them(scripted_encoder):
    texts = [[(5, 6, 7), (8,)], [(1, 2), (3, 4), (9,) * 20], [(7,)] * 3]

    async def main():
        async with WorkerTensors(scripted_encoder(**PATIENT)) as worker:
            ids = np.array([[3, 4, 5]] * 8)
            embedded = [worker.embed(sequences, normalize=False) for sequences in texts]
            *found, outputs = await asyncio.gather(
                *embedded, worker.infer({"input_ids": ids, "attention_mask": np.ones_like(ids)})
            )
            assert outputs["last_hidden_state"].tolist() == [[[3, 0, 12], [4, 1, 12], [5, 2, 12]]] * 8
            normalized = await asyncio.gather(*(worker.embed([(5, 6)] * 4, normalize=True) for _ in range(2)))
            return found, normalized, await worker.stats()

    found, normalized, stats = asyncio.run(main())
    for embeddings, sequences in zip(found, texts, strict=True):
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, [mean(ids) for ids in sequences])
    np.testing.assert_allclose(np.linalg.norm(normalized, axis=2), 1, rtol=1e-6)
    assert (stats.steps, stats.requests, stats.rows) == (3, 17, 24)
    assert stats.tokens == sum(len(ids) for sequences in texts for ids in sequences) + 16


def test_a_real_encoder_gives_the_embeddings_of_the_offline_api(tiny_encoder, encoder_artifact):
    path = encoder_artifact(tiny_encoder, {"bucketed": {"max_batch_size": 4}}, 64)
    texts = ["one", "two of them", "A model reads tokens and answers with the next one", "fox " * 60]
    with optkit.Encoder(path) as encoder:
        alone = encoder.encode(texts)

    async def main():
        async with WorkerTensors(path) as worker:
            sequences = EncoderText(path / "weights", worker.max_length).tokenize(texts, cut=True)
            many = await asyncio.gather(*(worker.embed([ids]) for ids in sequences))
            with pytest.raises(RequestError, match="input_ids: there are values outside 0 to"):
                await worker.infer({name: np.full((1, 2), 1 << 40) for name in worker.inputs})
            return np.concatenate(many), await worker.embed(sequences)

    one_by_one, together = asyncio.run(main())
    np.testing.assert_allclose(one_by_one, alone, atol=1e-5)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_only_what_cannot_be_computed_fails(scripted_tensors, scripted_encoder):
    async def main():
        async with WorkerTensors(scripted_tensors(**PATIENT)) as worker:
            good, bad = [rows(n) for n in range(7)], rows(RAISE)
            *found, error = await asyncio.gather(*map(worker.infer, [*good, bad]), return_exceptions=True)
            assert all(doubled(outputs, inputs) for outputs, inputs in zip(found, good, strict=True))
            assert isinstance(error, MachineError)
            assert str(error) == "the model failed (RuntimeError: this token cannot be computed)"
        async with WorkerTensors(scripted_encoder()) as worker:
            with pytest.raises(MachineError, match=r"text 2: the model failed \(RuntimeError: this token"):
                await worker.embed([(5,), (6,), (RAISE,), (7,)])
            assert (await worker.embed([(5,)])).tolist() == [[5, 0, 5]]
            assert (await until_waiting(worker, 0)).requests == 5

    asyncio.run(main())


def test_refusals_are_raised_again_as_what_they_are(scripted_tensors, scripted_encoder):
    async def main():
        async with WorkerTensors(scripted_encoder()) as worker:
            for sequences, words in (
                ([], "there are no sequences to encode"),
                ([(5,), ()], "text 1: there are no tokens to encode"),
                ([(5,), (6,), (1,) * 33], "text 2: there are 33 tokens to encode, a sequence can have 32"),
                ([(320,)], "text 0: there are token ids outside 0 to 319"),
                ([(1 << 70,)], r"the request cannot be sent \("),
            ):
                with pytest.raises(RequestError, match=words):
                    await worker.embed(sequences)
            assert (await until_waiting(worker, 0)).steps == 0  # not even for the good ones beside the bad
        async with WorkerTensors(scripted_tensors()) as worker:
            with pytest.raises(RequestError, match="x: is float64, the model takes float32"):
                await worker.infer({"x": np.zeros((1, 3))})
            with pytest.raises(RequestError, match="the model is no text encoder"):
                await worker.embed([(5,)])
            with pytest.raises(RequestError, match="arrays of object are not sent"):
                await worker.infer({"x": np.array([None])})
            assert doubled(await worker.infer(rows(4)), rows(4))

    asyncio.run(main())


def test_what_is_larger_than_a_message_is_refused_and_nothing_breaks(scripted_tensors):
    async def main():
        async with WorkerTensors(scripted_tensors()) as worker:
            pid = worker.pid
            with pytest.raises(RequestError, match=r"the request cannot be sent \(\d+ bytes are more than"):
                await worker.infer({"x": np.zeros((wire.LARGEST // 8, 3), np.float32)})
            with pytest.raises(RequestError, match=r"the answer cannot be sent \(\d+ bytes .* ask for less at once"):
                await worker.infer(rows(LARGE))
            assert doubled(await worker.infer(rows(4)), rows(4))
            assert worker.pid == pid

    asyncio.run(main())


def test_its_death_ends_what_it_was_asked_and_a_new_one_serves(scripted_tensors):
    async def main():
        async with WorkerTensors(scripted_tensors()) as worker:
            first = worker.pid
            task = asyncio.create_task(worker.infer(rows(HANG)))
            await until_computing(worker)
            later = asyncio.create_task(worker.infer(rows(5)))  # reaches the process, which does not begin with it
            await worker.stats()
            os.kill(first, signal.SIGKILL)
            async with asyncio.timeout(5):
                with pytest.raises(MachineError, match="was killed"):
                    await task
            async with asyncio.timeout(30):
                assert doubled(await worker.infer(rows(4)), rows(4))
                assert doubled(await later, rows(5))
            health = await worker.health()
            assert (health.ok, health.restarts) == (True, 1)
            assert worker.pid != first

    asyncio.run(main())


def test_one_that_dies_again_and_again_is_given_up(scripted_encoder, monkeypatch):
    monkeypatch.setattr(supervision, "_PAUSES", (0.0,))

    async def main():
        async with WorkerTensors(scripted_encoder()) as worker:
            for _ in range(2):
                with pytest.raises(MachineError, match="SIGABRT"):
                    await worker.embed([(5,), (ABORT,)])
            with pytest.raises(MachineError, match="2 worker processes died in a row"):
                await worker.embed([(5,)])
            assert (await worker.health()).state == "failed"

    asyncio.run(main())


def test_cancelling_frees_and_deadlines_end(scripted_tensors, scripted_encoder):
    async def main():
        async with WorkerTensors(scripted_encoder(**PATIENT)) as worker:
            task = asyncio.create_task(worker.embed([(5,), (6,), (7,)]))
            await until_waiting(worker, 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await until_waiting(worker, 0)).steps == 0
            with pytest.raises(MachineError, match="the model did not answer in time"):
                await worker.embed([(5,), (6,)], timeout=0.05)
            assert (await until_waiting(worker, 0)).steps == 0
        async with WorkerTensors(scripted_tensors(), patience=0.2) as worker:
            task = asyncio.create_task(worker.infer(rows(HANG)))
            await until_computing(worker)
            with pytest.raises(MachineError, match="did not answer in time"):
                await worker.infer(rows(1), timeout=0.05)
            while not (await worker.health()).hung:
                await asyncio.sleep(0.02)
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(MachineError, match="was killed"):
                await task

    asyncio.run(main())


def test_closing_ends_what_is_open(scripted_tensors):
    async def main():
        worker = WorkerTensors(scripted_tensors(**PATIENT))
        with pytest.raises(MachineError, match="was not started"):
            await worker.infer(rows(1))
        await worker.start()
        process = psutil.Process(worker.pid)
        task = asyncio.create_task(worker.infer(rows(1)))
        await until_waiting(worker, 1)
        await worker.close()
        await worker.close()
        with pytest.raises(MachineError, match="the engine is closed"):
            await task
        assert not process.is_running()
        assert (await worker.health()).state == "closed"
        with pytest.raises(MachineError, match="the engine is closed"):
            await worker.infer(rows(1))

    asyncio.run(main())


def test_a_bug_of_the_engine_replaces_the_process(scripted_tensors, scripted_plugin, capfd):
    plugin = scripted_plugin / "optkit_scripted.py"
    plugin.write_text(plugin.read_text().replace("time.sleep(3600)", "raise SystemExit(3)"))

    async def main():
        async with WorkerTensors(scripted_tensors()) as worker:
            with pytest.raises(MachineError, match="the engine failed: SystemExit: 3"):
                await worker.infer(rows(HANG))
            assert doubled(await worker.infer(rows(4)), rows(4))

    asyncio.run(main())
    assert "Traceback" in capfd.readouterr().err


def test_what_opening_meets_is_raised_here(scripted, scripted_encoder, scripted_tensors):
    chunks = {"continuous": {"max_batch_size": 4, "max_step_tokens": 16}}
    damaged = scripted_encoder(name="damaged")
    (damaged / "weights/config.json").write_text("{}")
    cases = [
        (WorkerTensors(scripted()), RecipeError, r"is a causal language model; optkit\.WorkerEngine runs it"),
        (WorkerEngine(scripted_tensors()), RecipeError, r"is no causal language model; optkit\.WorkerTensors runs it"),
        (WorkerTensors(scripted_encoder(**chunks)), RecipeError, "Continuous gives a model of one step 16 of 32"),
        (WorkerTensors(damaged), DamagedError, r"config\.json"),
    ]

    async def main():
        for worker, kind, words in cases:
            with pytest.raises(kind, match=words):
                await worker.start()
            assert (await worker.health()).state == "failed"
            await worker.close()

    asyncio.run(main())
