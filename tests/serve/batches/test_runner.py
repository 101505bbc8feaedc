"""Batches go from state to state as OpenAI says, and each line is answered once, whatever its engine does."""

from __future__ import annotations

import asyncio
import time

import pytest

from optkit.errors import MachineError
from optkit.serve.errors import DIED, ApiError, Refused

from .conftest import ALICE, BOB, CHAT, EMBEDDINGS, Answerer, contents, create, ended, line, upload


def numbered(count, start=0):
    return [line(place, {"prompt": place}) for place in range(start, start + count)]


def test_answers_stand_in_the_order_of_the_requests_and_errors_apart_from_them(queue):
    class Picky(Answerer):
        async def answer(self, prompt):
            await asyncio.sleep(0.001 * (7 - prompt % 7))
            if prompt % 5 == 3:
                raise ApiError(400, "no threes", param="prompt")
            if prompt == 7:
                raise RuntimeError("a bug")
            return await super().answer(prompt)

    async def test(batches, asked):
        id = await create(batches, ALICE, [*numbered(12), line("streams", {"prompt": 99, "stream": True})])
        batch = await ended(batches, ALICE, id)
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 13, "completed": 9, "failed": 4}
        assert (batch["usage"]["input_tokens"], batch["usage"]["output_tokens"]) == (27, 18)
        assert batch["usage"]["total_tokens"] == 45
        good = await contents(batches, ALICE, batch["output_file_id"])
        assert [one["custom_id"] for one in good] == ["0", "1", "2", "4", "5", "6", "9", "10", "11"]
        assert good[0]["response"]["body"]["echo"] == 0
        assert good[0]["response"]["status_code"] == 200
        assert good[0]["error"] is None
        bad = await contents(batches, ALICE, batch["error_file_id"])
        assert [(one["custom_id"], one["response"]["status_code"]) for one in bad] == [
            ("3", 400),
            ("7", 500),
            ("8", 400),
            ("streams", 400),
        ]
        assert bad[0]["response"]["body"]["error"]["message"] == "no threes"
        assert "bug" not in str(bad)
        assert len({one["id"] for one in good + bad}) == 13
        assert 99 not in asked.asked
        assert asked.most == 4
        assert {(one.name, one.salt, one.admin) for one in asked.tenants} == {("alice", "a-salt", False)}
        order = ["created_at", "in_progress_at", "finalizing_at", "completed_at"]
        assert [batch[name] for name in order] == sorted(batch[name] for name in order)
        assert batch["expires_at"] == batch["created_at"] + 24 * 3600
        file = await batches.file(ALICE, batch["output_file_id"])
        assert (file["purpose"], file["filename"]) == ("batch_output", f"{id}_output.jsonl")

    queue(test, Picky())


@pytest.mark.parametrize(
    ("lines", "faults"),
    [
        ([], [(None, "empty_file")]),
        (["", "  "], [(None, "empty_file")]),
        (
            ["{", line(1), "[1]", '{"a": NaN}'],
            [(1, "invalid_json_line"), (3, "invalid_json_line"), (4, "invalid_json_line")],
        ),
        ([line(1), "", line(1)], [(3, "duplicate_custom_id")]),
        ([line(1), line(2, url=CHAT)], [(2, "mismatched_endpoint")]),
        (
            [line(1, {"model": "a"}), line(2, {"model": "b"}), line(3)],
            [(2, "mismatched_model"), (3, "mismatched_model")],
        ),
        ([line(1, {"model": 3}), line(2, {"model": "\ud800"})], [(1, "invalid_model"), (2, "invalid_model")]),
        ([line(""), line("x" * 513)], [(1, "invalid_custom_id"), (2, "invalid_custom_id")]),
        (['{"custom_id": "1", "method": "POST", "url": "/v1/completions"}'], [(1, "missing_required_parameter")]),
        ([line(1)[:-1] + ', "extra": 1}'], [(1, "unknown_parameter")]),
        ([line(1).replace("POST", "GET")], [(1, "invalid_method")]),
        (["[" * 100_000], [(1, "invalid_json_line")]),
        ([line(1, {"model": "absent"})], [(None, "model_not_found")]),
        ([line(place) for place in range(6)], [(6, "too_many_tasks")]),
        (["x" * 200_000], [(1, "line_too_long")]),
        (["{"] * 50, [(number, "invalid_json_line") for number in range(1, 6)] + [(6, "too_many_tasks")]),
    ],
)
def test_a_wrong_input_fails_the_batch_and_says_where(queue, lines, faults):
    from optkit.serve.batches import Quota

    async def test(batches, asked):
        batch = await ended(batches, ALICE, await create(batches, ALICE, lines))
        assert batch["status"] == "failed"
        assert batch["failed_at"] >= batch["created_at"]
        assert [(one["line"], one["code"]) for one in batch["errors"]["data"]] == faults
        assert (batch["output_file_id"], batch["error_file_id"], asked.asked) == (None, None, [])

    queue(test, quota=Quota(lines=5, line_bytes=150_000))


def test_an_embeddings_batch_has_its_own_endpoint_and_usage(queue):
    class Embedder(Answerer):
        async def answer(self, prompt):
            return {"usage": {"prompt_tokens": 5, "total_tokens": 5}}

    async def test(batches, asked):
        id = await create(batches, ALICE, [line(1, url=EMBEDDINGS)], EMBEDDINGS)
        batch = await ended(batches, ALICE, id)
        assert (batch["status"], batch["usage"]["total_tokens"]) == ("completed", 5)

    queue(test, Embedder())


def test_a_line_that_is_turned_away_waits_and_is_answered_later(queue):
    class Full(Answerer):
        refusals = 0

        async def answer(self, prompt):
            if self.refusals < 9:
                self.refusals += 1
                raise Refused(429 if self.refusals % 2 else 503, "full")
            return await super().answer(prompt)

    async def test(batches, asked):
        batch = await ended(batches, ALICE, await create(batches, ALICE, numbered(6)))
        assert batch["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
        assert len(asked.asked) == 15

    queue(test, Full())


@pytest.mark.parametrize("death", [MachineError("the process died"), Refused(503, "died", code=DIED)])
def test_a_line_that_kills_the_worker_three_times_fails_and_takes_no_other_with_it(queue, death):
    class Deadly(Answerer):
        """A worker: everything that is open dies with it."""

        def __init__(self):
            super().__init__()
            self.open = set()

        async def answer(self, prompt):
            dying = asyncio.get_running_loop().create_future()
            self.open.add(dying)
            try:
                if prompt == 5:
                    for one in self.open:
                        if not one.done():
                            one.set_exception(death)
                await asyncio.wait((dying,), timeout=0.001)
                if dying.done():
                    raise dying.exception()
                return await super().answer(prompt)
            finally:
                self.open.discard(dying)

    async def test(batches, asked):
        batch = await ended(batches, ALICE, await create(batches, ALICE, numbered(20)))
        assert batch["request_counts"] == {"total": 20, "completed": 19, "failed": 1}
        [failed] = await contents(batches, ALICE, batch["error_file_id"])
        assert (failed["custom_id"], failed["response"]["status_code"]) == ("5", 500)
        assert failed["response"]["body"]["error"]["code"] == DIED
        assert asked.asked.count(5) == 3

    queue(test, Deadly())


def test_a_model_that_is_gone_for_a_while_is_waited_for(queue):
    async def test(batches, asked):
        asked.gate.clear()
        id = await create(batches, ALICE, numbered(9))
        while asked.now < 4:
            await asyncio.sleep(0)
        asked.seats = 0
        asked.gate.set()
        while asked.now:
            await asyncio.sleep(0)
        assert (await batches.batch(ALICE, id))["status"] == "in_progress"
        asked.seats = 2
        assert (await ended(batches, ALICE, id))["request_counts"]["completed"] == 9

    queue(test)


def test_tenants_get_their_turns_whoever_came_first(queue):
    async def test(batches, asked):
        asked.seats = 1
        asked.gate.clear()
        first = await create(batches, ALICE, numbered(40))
        second = await create(batches, ALICE, numbered(5, 100))
        while not asked.asked:
            await asyncio.sleep(0)
        third = await create(batches, BOB, numbered(10, 200))
        while (await batches.batch(BOB, third))["status"] == "validating":
            await asyncio.sleep(0.001)
        asked.gate.set()
        for tenant, id in ((ALICE, first), (ALICE, second), (BOB, third)):
            await ended(batches, tenant, id)
        names = "".join("b" if prompt >= 200 else "a" for prompt in asked.asked)
        assert "ab" * 9 in names
        # And of one tenant the older batch goes first.
        ours = [prompt for prompt in asked.asked if prompt < 200]
        assert ours.index(100) >= 39

    queue(test)


def test_a_cancelled_batch_keeps_what_is_answered(queue):
    class Slow(Answerer):
        async def answer(self, prompt):
            if prompt >= 6:
                await asyncio.Event().wait()
            return await super().answer(prompt)

    async def test(batches, asked):
        id = await create(batches, ALICE, numbered(30))
        while (await batches.batch(ALICE, id))["request_counts"]["completed"] < 6:
            await asyncio.sleep(0.001)
        assert (await batches.cancel(ALICE, id))["status"] == "cancelling"
        batch = await ended(batches, ALICE, id)
        assert batch["status"] == "cancelled"
        assert batch["cancelling_at"] <= batch["cancelled_at"]
        assert asked.now == 0
        good = await contents(batches, ALICE, batch["output_file_id"])
        assert [one["custom_id"] for one in good] == list("012345")
        assert batch["error_file_id"] is None
        assert (await batches.cancel(ALICE, id))["status"] == "cancelled"

    queue(test, Slow())


def test_a_batch_that_was_cancelled_at_once_ends(queue):
    async def test(batches, asked):
        ids = [await create(batches, ALICE, numbered(50)) for _ in range(3)]
        for id in ids:
            await batches.cancel(ALICE, id)
        assert {(await ended(batches, ALICE, id))["status"] for id in ids} == {"cancelled"}

    queue(test)


def test_an_expired_batch_has_what_there_is_and_says_what_is_not(queue):
    async def begin(batches, asked):
        asked.seats = 2

        async def some(prompt):
            if prompt >= 3:
                await asyncio.Event().wait()
            return {"echo": prompt}

        asked.answer = some
        id = await create(batches, ALICE, numbered(8))
        while (await batches.batch(ALICE, id))["request_counts"]["completed"] < 3:
            await asyncio.sleep(0.001)
        return id

    async def late(batches, asked):
        batch = await ended(batches, ALICE, id)
        assert (batch["status"], batch["expired_at"] >= batch["expires_at"]) == ("expired", True)
        assert asked.asked == []
        good = await contents(batches, ALICE, batch["output_file_id"])
        assert [one["custom_id"] for one in good] == ["0", "1", "2"]
        bad = await contents(batches, ALICE, batch["error_file_id"])
        assert [one["custom_id"] for one in bad] == ["3", "4", "5", "6", "7"]
        assert {(one["response"], one["error"]["code"]) for one in bad} == {(None, "batch_expired")}

    id = queue(begin)
    queue(late, now=lambda: time.time() + 25 * 3600)


def test_a_closed_queue_goes_on_by_itself_and_answers_nothing_twice(queue):
    class Stops(Answerer):
        async def answer(self, prompt):
            if prompt >= 10:
                await asyncio.Event().wait()
            return await super().answer(prompt)

    async def begin(batches, asked):
        id = await create(batches, ALICE, numbered(30))
        while (await batches.batch(ALICE, id))["request_counts"]["completed"] < 10:
            await asyncio.sleep(0.001)
        return id

    async def go_on(batches, asked):
        batch = await ended(batches, ALICE, id)
        assert batch["request_counts"]["completed"] == 30
        assert sorted(asked.asked) == list(range(10, 30))
        # And no line is left in the database: the files have them.
        while await batches._db(lambda: batches._store._all("SELECT 1 FROM lines")):
            await asyncio.sleep(0.001)

    id = queue(begin, Stops())
    queue(go_on)


def test_a_paused_queue_is_still_read_and_written(queue):
    async def begin(batches, asked):
        asked.gate.clear()
        first = await create(batches, ALICE, numbered(5))
        while not asked.now:
            await asyncio.sleep(0)
        await batches.pause()
        assert asked.now == 0
        second = await create(batches, ALICE, numbered(5))
        assert (await batches.batch(ALICE, second))["status"] == "validating"
        await batches.close()  # and once more after the test
        return first, second

    async def go_on(batches, asked):
        return [(await ended(batches, ALICE, id))["status"] for id in ids]

    ids = queue(begin)
    assert queue(go_on) == ["completed", "completed"]


def test_a_deleted_input_is_refused_while_its_batch_is_open(queue):
    async def test(batches, asked):
        asked.gate.clear()
        file = await upload(batches, ALICE, numbered(3))
        made = await batches.create(ALICE, input_file=file, endpoint="/v1/completions", metadata={"a": "b"})
        with pytest.raises(ApiError) as refused:
            await batches.delete_file(ALICE, file)
        assert (refused.value.status, refused.value.code) == (400, "file_in_use")
        asked.gate.set()
        assert (await ended(batches, ALICE, made["id"]))["metadata"] == {"a": "b"}
        assert (await batches.delete_file(ALICE, file))["deleted"]
        with pytest.raises(ApiError):
            await batches.file(ALICE, file)

    queue(test)
