"""Many tasks share one engine: each gets its own output, whole and once, and nobody who left keeps a block."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from optkit.engine.async_llm import AsyncLLM
from optkit.engine.llm import LLM
from optkit.engine.request import SamplingParams, Structure
from optkit.errors import MachineError, MissingError, RequestError

PROMPTS = ["The capital of France is", "0 1 2 3 4", "fox", [{"role": "user", "content": "What?"}], (7, 42, 99)]
PARAMS = SamplingParams(max_tokens=20)


async def settled(engine):
    """The engine's counters once nothing is alive any more."""
    while (stats := await engine.stats()).waiting or stats.running or stats.used_blocks:
        await asyncio.sleep(0.005)
    return stats


async def together(engine, prompts, params=PARAMS):
    return await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))


@pytest.fixture
def alone(scripted):
    """What each prompt gets from the offline API."""
    with LLM(scripted(name="alone")) as llm:
        return [llm.generate(prompt, PARAMS)[0] for prompt in PROMPTS]


def test_tasks_at_once_get_what_each_gets_alone(scripted, alone):
    async def main():
        async with AsyncLLM(scripted()) as llm:
            assert (llm.name, llm.max_length) == ("scripted", 128)
            return await together(llm, PROMPTS * 3), await settled(llm)

    completions, stats = asyncio.run(main())
    assert completions == alone * 3
    assert (stats.requests, stats.output_tokens) == (15, 300)


def test_a_stream_is_the_completion_in_pieces(scripted, alone):
    async def main():
        async with AsyncLLM(scripted()) as llm:
            return [delta async for delta in llm.stream(PROMPTS[0], PARAMS)]

    deltas = asyncio.run(main())
    assert "".join(delta.text for delta in deltas) == alone[0].text
    assert [token for delta in deltas for token in delta.tokens] == list(alone[0].samples[0].tokens)
    assert [delta.last for delta in deltas] == [False] * 19 + [True]
    assert deltas[0].prompt.tokens == alone[0].prompt_tokens


def test_who_stops_reading_frees_the_blocks(scripted):
    async def main():
        async with AsyncLLM(scripted(0.002)) as llm:
            long = SamplingParams(max_tokens=100)
            async for _ in llm.stream("broken off", long):
                break
            held = llm.stream("closed", long)
            await anext(held)
            await held.aclose()
            task = asyncio.create_task(llm.generate("cancelled", long))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await settled(llm)

    stats = asyncio.run(main())
    assert stats.requests == 3
    assert stats.output_tokens < 300


def test_a_cancelled_request_says_so_to_its_reader(scripted):
    async def main():
        async with AsyncLLM(scripted(0.002)) as llm, await llm.submit("a", SamplingParams(max_tokens=100)) as stream:
            await anext(stream)
            llm.cancel(stream.request)
            deltas = [delta async for delta in stream]
            return deltas, stream.prompt_tokens

    deltas, prompt_tokens = asyncio.run(main())
    assert [delta.finished for delta in deltas if delta.finished] == ["cancelled"]
    assert deltas[-1].last
    assert prompt_tokens == 1


@pytest.mark.parametrize("seed", range(3))
def test_random_cancels_leave_one_end_each_and_no_block(scripted, seed):
    dice = random.Random(seed)

    async def one(llm, number):
        params = SamplingParams(max_tokens=dice.randint(1, 12), n=dice.choice([1, 1, 3]), seed=number)
        prompt = tuple(dice.randint(6, 200) for _ in range(dice.randint(1, 20)))
        await asyncio.sleep(dice.random() * 0.2)
        async with await llm.submit(prompt, params) as stream:
            patience, ends, finished = dice.choice([0, 1, 5, 99, 99]), 0, []
            async for delta in stream:
                assert not ends, "a delta after the end"
                ends += delta.last
                finished += [delta.sample] if delta.finished else []
                patience -= 1
                if patience == 0:
                    llm.cancel(stream.request)
                elif patience == -1:
                    return "left"
        assert ends == 1
        assert sorted(finished) == list(range(params.n))
        return "ended"

    async def main():
        async with AsyncLLM(scripted()) as llm:
            outcomes = await asyncio.gather(*(one(llm, number) for number in range(300)))
            return outcomes, await settled(llm)

    outcomes, stats = asyncio.run(main())
    assert {"ended", "left"} >= set(outcomes) >= {"ended"}
    assert (stats.requests, stats.used_blocks) == (300, 0)


def test_what_could_never_be_served_is_refused_and_others_go_on(scripted):
    async def main():
        async with AsyncLLM(scripted()) as llm:
            with pytest.raises(RequestError, match="a sequence can have 128"):
                await llm.generate("long", SamplingParams(max_tokens=1000))
            with pytest.raises(RequestError, match="empty"):
                await anext(llm.stream(()))
            with pytest.raises(RequestError, match="cannot be followed"):
                await llm.submit("a", SamplingParams(max_tokens=5, structure=Structure(regex="(")))
            return await llm.generate("short", PARAMS), await settled(llm)

    completion, stats = asyncio.run(main())
    assert completion.samples[0].finish_reason == "length"
    assert stats.requests == 1


def test_a_request_that_cannot_be_computed_fails_alone(scripted):
    async def main():
        async with AsyncLLM(scripted(0.001)) as llm:
            return await asyncio.gather(llm.generate("good", PARAMS), llm.generate((7, 312), PARAMS))

    good, bad = asyncio.run(main())
    assert good.samples[0].finish_reason == "length"
    assert bad.samples[0].finish_reason == "error"
    assert bad.error == "RuntimeError: this token cannot be computed"


def test_a_deadline_ends_a_request_with_what_it_has(scripted):
    async def main():
        async with AsyncLLM(scripted(0.01)) as llm:
            return await llm.generate("slow", SamplingParams(max_tokens=100), timeout=0.2)

    [sample] = asyncio.run(main()).samples
    assert sample.finish_reason == "deadline"
    assert 0 < len(sample.tokens) < 100


def test_a_bug_of_the_engine_ends_everything_and_is_reported(scripted, monkeypatch, caplog):
    async def main():
        async with AsyncLLM(scripted(0.002)) as llm:
            good = asyncio.create_task(llm.generate("a", SamplingParams(max_tokens=100, n=2)))
            await asyncio.sleep(0.02)
            monkeypatch.setattr(llm._opened.engine._engine, "_commit", None)
            completion = await good
            with pytest.raises(MachineError, match=r"the engine failed: TypeError: .*; open it again"):
                await llm.generate("b")
            return completion, await llm.health()

    completion, health = asyncio.run(main())
    assert {sample.finish_reason for sample in completion.samples} == {"error"}
    assert completion.error.startswith("the engine failed: TypeError: ")
    assert (health.state, health.ok) == ("failed", False)
    assert "the engine failed" in caplog.text


def test_closing_cancels_what_is_open(scripted):
    async def main():
        llm = AsyncLLM(scripted(0.002))
        task = asyncio.create_task(llm.generate("a", SamplingParams(max_tokens=100)))
        await asyncio.sleep(0.02)
        assert (await llm.health()).ok
        await llm.close()
        await llm.close()
        assert (await llm.health()).state == "closed"
        with pytest.raises(MachineError, match="the engine is closed"):
            await llm.generate("b")
        return await task

    assert asyncio.run(main()).samples[0].finish_reason == "cancelled"


def test_several_event_loops_share_one_engine(scripted, alone):
    llm = AsyncLLM(scripted(0.001))
    results = {}

    def loop(number):
        results[number] = asyncio.run(together(llm, PROMPTS))

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(3), alone)

    async def abandon():
        await llm.submit("nobody reads this", SamplingParams(max_tokens=100))

    asyncio.run(abandon())
    stats = asyncio.run(settled(llm))
    assert stats.output_tokens < 300 + 100
    asyncio.run(llm.close())


def test_a_step_that_takes_too_long_shows_in_its_health(scripted):
    async def main():
        async with AsyncLLM(scripted(0.8), patience=0.05) as llm:
            task = asyncio.create_task(llm.generate("a", SamplingParams(max_tokens=1)))
            while not (during := await llm.health()).hung:
                await asyncio.sleep(0.01)
            await task
            while (after := await llm.health()).hung:  # the answer comes a moment before the step is over
                await asyncio.sleep(0.01)
            return during, after

    during, after = asyncio.run(main())
    assert (during.state, during.ok) == ("ready", False)
    assert (after.hung, after.silent, after.ok) == (False, 0.0, True)


def test_what_opening_meets_is_raised_here(tmp_path):
    with pytest.raises(MissingError, match="no artifact here"):
        AsyncLLM(tmp_path / "nothing")
