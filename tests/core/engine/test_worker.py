"""The engine in a process of its own: whatever happens to it, requests end, and the next ones are served."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import psutil
import pytest

from optkit.engine import supervision, wire
from optkit.engine.async_llm import AsyncLLM
from optkit.engine.client import WorkerEngine
from optkit.engine.llm import LLM
from optkit.engine.outputs import Delta
from optkit.engine.request import PromptFacts, SamplingParams, Structure, TokenLogprob
from optkit.errors import DamagedError, MachineError, MissingError, OptkitError, RequestError

PARAMS = SamplingParams(max_tokens=20, logprobs=2, prompt_logprobs=1)
LONG = SamplingParams(max_tokens=100)
PROMPTS = ["The capital of France is", "fox", [{"role": "user", "content": "What?"}], (7, 42, 99)]


async def settled(engine):
    while (stats := await engine.stats()).waiting or stats.running or stats.used_blocks:
        await asyncio.sleep(0.005)
    return stats


def test_it_gives_what_the_offline_api_gives(scripted):
    with LLM(scripted(name="alone")) as llm:
        alone = [llm.generate(prompt, PARAMS)[0] for prompt in PROMPTS]
        tokens = llm.generate("fox", SamplingParams(max_tokens=1))[0].prompt_tokens

    async def main():
        async with WorkerEngine(scripted()) as engine:
            assert (engine.name, engine.max_length) == ("scripted", 128)
            assert len(await engine.encode("fox")) == tokens
            completions = await asyncio.gather(*(engine.generate(prompt, PARAMS) for prompt in PROMPTS * 5))
            health = await engine.health()
            assert (health.ok, health.restarts) == (True, 0)
            return completions, await settled(engine)

    completions, stats = asyncio.run(main())
    for one, other in zip(completions, alone * 5, strict=True):
        [here], [there] = one.samples, other.samples
        assert (here.text, here.tokens, here.finish_reason) == (there.text, there.tokens, there.finish_reason)
        assert (one.prompt_tokens, one.error) == (other.prompt_tokens, "")
        for mine, theirs in ((here.logprobs, there.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert [scored.token for scored in mine] == [scored.token for scored in theirs]
            # What is computed together decides the last bits.
            assert [scored.logprob for scored in mine] == pytest.approx([scored.logprob for scored in theirs])
            assert [scored.top[0][0] for scored in mine] == [scored.top[0][0] for scored in theirs]
    assert stats.requests == 20


def test_a_real_model_says_the_same_in_every_thread_and_process(real):
    with LLM(real) as llm:
        alone = [one.samples[0].tokens for one in llm.generate(PROMPTS, SamplingParams(max_tokens=12))]

    async def tokens(engine):
        async with engine:
            many = (engine.generate(prompt, SamplingParams(max_tokens=12)) for prompt in PROMPTS)
            found = [one.samples[0].tokens for one in await asyncio.gather(*many)]
            return found, (await settled(engine)).used_blocks

    assert asyncio.run(tokens(AsyncLLM(real))) == (alone, 0)
    assert asyncio.run(tokens(WorkerEngine(real))) == (alone, 0)


def test_text_of_many_bytes_streams_whole(scripted):
    params = SamplingParams(max_tokens=40, structure=Structure(choice="Grüße, 世界 🎉!"))

    async def main():
        async with WorkerEngine(scripted()) as engine:
            prompt = [{"role": "user", "content": "Grüße, 世界 🎉!"}]
            return [delta.text async for delta in engine.stream(prompt, params)]

    pieces = asyncio.run(main())
    assert "".join(pieces) == "Grüße, 世界 🎉!"
    assert len(pieces) > 10


def test_who_leaves_frees_the_blocks_and_who_cancels_is_told(scripted):
    async def main():
        async with WorkerEngine(scripted(0.002)) as engine:
            async for _ in engine.stream("left", LONG):
                break
            task = asyncio.create_task(engine.generate("cancelled", LONG))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with await engine.submit("told", LONG) as stream:
                assert stream.prompt_tokens > 0
                engine.cancel(stream.request)
                told = [delta.finished async for delta in stream][-1]
            return told, await settled(engine)

    told, stats = asyncio.run(main())
    assert told == "cancelled"
    assert (stats.requests, stats.used_blocks) == (3, 0)
    assert stats.output_tokens < 300


def test_refusals_are_raised_again_as_what_they_are(scripted):
    async def main():
        async with WorkerEngine(scripted()) as engine:
            with pytest.raises(RequestError, match="a sequence can have 128"):
                await engine.generate("long", SamplingParams(max_tokens=1000))
            with pytest.raises(RequestError, match="this regex cannot be followed"):
                await engine.submit("a", SamplingParams(max_tokens=5, structure=Structure(regex="(")))
            with pytest.raises(RequestError, match=r"the request cannot be sent \("):
                await engine.submit((1 << 70,), PARAMS)
            with pytest.raises(RequestError, match="token ids outside 0 to 319"):
                await engine.submit((-1,), PARAMS)
            return await engine.generate("good", PARAMS)

    assert asyncio.run(main()).samples[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda artifact: (artifact / "manifest.json").unlink(), MissingError),
        (lambda artifact: (artifact / "weights/tokenizer.json").write_text("{}"), DamagedError),
    ],
)
def test_what_opening_meets_is_raised_here(scripted, damage, kind):
    artifact = scripted()
    damage(artifact)
    with pytest.raises(kind) as offline:
        LLM(artifact)

    async def main():
        engine = WorkerEngine(artifact)
        with pytest.raises(kind) as here:
            await engine.start()
        assert str(here.value) == str(offline.value)
        assert (await engine.health()).state == "failed"
        with pytest.raises(kind):
            await engine.generate("a")
        await engine.close()

    asyncio.run(main())


def kill(engine):
    os.kill(engine.pid, signal.SIGKILL)


def abort(engine):
    return engine.generate((7, 310), PARAMS)


@pytest.mark.parametrize(
    ("blow", "words"),
    [
        (signal.SIGKILL, "was killed, most likely because memory ran out"),
        (signal.SIGSEGV, "died of SIGSEGV"),
    ],
)
def test_its_death_ends_every_open_request_and_a_new_one_serves(scripted, blow, words):
    async def reader(engine, number):
        params = SamplingParams(max_tokens=100, n=1 + number % 2)
        return [delta async for delta in engine.stream(f"prompt {number}", params)]

    async def main():
        async with WorkerEngine(scripted(0.01, batch=8)) as engine:
            first = engine.pid
            readers = [asyncio.create_task(reader(engine, number)) for number in range(7)]
            while (await engine.stats()).output_tokens < 10:
                await asyncio.sleep(0.01)
            os.kill(first, blow)
            async with asyncio.timeout(5):
                streams = await asyncio.gather(*readers)
            async with asyncio.timeout(30):
                again = await engine.generate("again", PARAMS)
            health = await engine.health()
            assert engine.pid != first
            return streams, again, health

    streams, again, health = asyncio.run(main())
    for number, deltas in enumerate(streams):
        assert [delta.last for delta in deltas].count(True) == 1
        assert deltas[-1].last
        ends = [(delta.sample, delta.finished) for delta in deltas if delta.finished]
        assert ends == [(sample, "error") for sample in range(1 + number % 2)]
        assert words in deltas[-1].error
    assert again.samples[0].finish_reason == "length"
    assert (health.ok, health.restarts) == (True, 1)


def test_a_bug_of_the_engine_replaces_the_process(scripted, scripted_plugin, capfd):
    # Not an error of one request: the engine lets it through.
    plugin = scripted_plugin / "optkit_scripted.py"
    plugin.write_text(plugin.read_text().replace("time.sleep(3600)", "raise SystemExit(3)"))

    async def main():
        async with WorkerEngine(scripted(0.001)) as engine:
            failed = await engine.generate((7, 311), PARAMS)
            return failed, await engine.generate("again", PARAMS)

    failed, again = asyncio.run(main())
    assert failed.error == "the engine failed: SystemExit: 3"
    assert again.samples[0].finish_reason == "length"
    assert "Traceback" in capfd.readouterr().err


def test_while_one_after_the_other_dies_requests_are_refused(scripted, monkeypatch):
    monkeypatch.setattr(supervision, "_PAUSES", (0.0,))
    monkeypatch.setattr(supervision, "_LONG_PAUSE", 0.0)

    async def main():
        async with WorkerEngine(scripted()) as engine:
            for _ in range(2):
                assert "SIGABRT" in (await abort(engine)).error
            with pytest.raises(MachineError, match=r"2 worker processes died in a row, the last one: .* SIGABRT"):
                await engine.generate("b")
            with pytest.raises(MachineError, match="2 worker processes died in a row"):
                await engine.stats()
            health = await engine.health()
            assert (health.state, health.ok) == ("failed", False)
            while not (health := await engine.health()).ok:
                await asyncio.sleep(0.01)
            assert health.restarts == 2
            return await engine.generate("b", PARAMS)

    assert asyncio.run(main()).samples[0].finish_reason == "length"


def test_requests_wait_for_the_new_process_as_long_as_they_like(scripted, monkeypatch):
    async def main():
        async with WorkerEngine(scripted()) as engine:
            kill(engine)
            while (await engine.health()).state != "starting":
                await asyncio.sleep(0)
            with pytest.raises(MachineError, match=r"no worker process was ready in time \(.* was killed"):
                await engine.generate("a", PARAMS, timeout=0.01)
            return await engine.generate("a", PARAMS, timeout=60)

    assert asyncio.run(main()).samples[0].finish_reason == "length"


def test_a_hung_step_shows_in_its_health_and_nothing_else_is_done(scripted):
    async def main():
        async with WorkerEngine(scripted(), patience=0.2) as engine:
            pid = engine.pid
            task = asyncio.create_task(engine.generate((7, 311), PARAMS))
            while not (await engine.health()).hung:
                await asyncio.sleep(0.02)
            os.kill(pid, signal.SIGSTOP)  # now not even an answer comes
            health = await engine.health()
            assert (health.state, health.hung, health.ok) == ("ready", True, False)
            os.kill(pid, signal.SIGCONT)
            assert engine.pid == pid
            kill(engine)
            return await task

    assert asyncio.run(main()).samples[0].finish_reason == "error"


def test_an_interrupt_does_not_reach_it_and_closing_ends_it(scripted):
    async def main():
        engine = WorkerEngine(scripted(0.002))
        await engine.start()
        process = psutil.Process(engine.pid)
        assert os.getpgid(engine.pid) != os.getpgid(0)
        process.send_signal(signal.SIGINT)
        task = asyncio.create_task(engine.generate("open", LONG))
        assert (await engine.generate("a", PARAMS)).samples[0].finish_reason == "length"
        await engine.close()
        await engine.close()
        assert (await task).samples[0].finish_reason == "cancelled"
        assert not process.is_running()
        assert (await engine.health()).state == "closed"
        with pytest.raises(MachineError, match="the engine is closed"):
            await engine.generate("b")

    asyncio.run(main())


def test_the_death_of_its_parent_ends_it(scripted):
    code = (
        "import asyncio, sys\n"
        "from optkit.engine.client import WorkerEngine\n"
        "async def main():\n"
        "    async with WorkerEngine(sys.argv[1]) as engine:\n"
        "        print(engine.pid, flush=True)\n"
        "        await engine.generate((7, 311))\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code, str(scripted())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    gone, _ = psutil.wait_procs([worker], timeout=20)
    assert gone or worker.status() == psutil.STATUS_ZOMBIE


def test_messages_are_bounded_and_whole():
    delta = Delta(
        3,
        1,
        "half \ud83d",
        (4, 5),
        (TokenLogprob(4, -0.5, ((4, -0.5), (9, -1.25))),) * 2,
        "stop",
        True,
        PromptFacts(2, 1, (TokenLogprob(8, -2.0, ()),)),
        "",
    )
    bare = Delta(4, 0, "", ())
    [frame] = wire.delta_frames([delta, bare])
    assert wire.length(frame[: wire.HEADER]) == len(frame) - wire.HEADER
    kind, packed = wire.unpack(frame[wire.HEADER :])
    assert (kind, wire.unpack_deltas(packed)) == ("deltas", [delta, bare])
    with pytest.raises(ValueError, match="more than"):
        wire.length(b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="more than"):
        wire.pack("submit", "x" * (wire.LARGEST + 1))
    large = Delta(5, 0, "x" * (wire.LARGEST // 3), ())
    assert len(wire.delta_frames([large, large, large, large])) == 2
    assert wire.fits(1000, 64)
    assert not wire.fits(100_000, 64)


class OfAPlugin(MachineError):
    pass


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (RequestError("no", where="here", found={"a": [1, 2]}, remedy="go"), None),
        (MachineError("no", found=1 << 80), MachineError("no", found=str(1 << 80))),
        (OfAPlugin("no"), MachineError("no")),
        (KeyError("x"), OptkitError("KeyError: 'x'")),
    ],
)
def test_errors_arrive_as_they_were(error, again):
    arrived = wire.unpack_error(wire.unpack(wire.pack(wire.pack_error(error))[wire.HEADER :])[0])
    wanted = error if again is None else again
    assert (type(arrived), str(arrived)) == (type(wanted), str(wanted))
