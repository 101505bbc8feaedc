"""The store says what is so: in any order of calls, after any end of the process, and when the disk has no room."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from optkit.errors import DamagedError, MachineError
from optkit.serve.batches.checking import Checked
from optkit.serve.batches.objects import Answer, Usage
from optkit.serve.batches.quota import Quota
from optkit.serve.batches.store import Store
from optkit.serve.errors import ApiError

from .conftest import ALICE, create, ended, line, upload

LINES = 6


def opened(directory, now=lambda: 1000.0):
    return Store(directory, Quota(open_batches=3), now)


class Queue(RuleBasedStateMachine):
    """A store beside what it should say. It is closed, or copied while it is open as a dead process leaves it."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.lives = 0
        self.store = opened(self.root / "0")
        self.status, self.answers = {}, {}

    @initialize()
    def file(self):
        writer = self.store.files.begin()
        writer.write(b"x" * LINES)
        writer.publish()
        self.input = self.store.add_file("alice", writer.id, "batch", "in", LINES)["id"]

    @rule()
    def create(self):
        waiting = sum(
            status in ("validating", "in_progress", "cancelling", "finalizing") for status in self.status.values()
        )
        try:
            seq, batch = self.store.create(
                "alice", "", input_file=self.input, endpoint="/v1/completions", metadata=None
            )
        except ApiError:
            assert waiting == 3
            return
        assert waiting < 3
        assert batch["status"] == "validating"
        self.status[seq], self.answers[seq] = "validating", {}

    @precondition(lambda self: self.status)
    @rule(data=st.data(), good=st.booleans())
    def validated(self, data, good):
        seq = data.draw(st.sampled_from(list(self.status)))
        checked = Checked("/v1/completions", Quota())
        for place in range(LINES):
            checked.starts.append(place)
            checked.lengths.append(1)
        self.store.validated(seq, checked, [] if good else [{"code": "bad"}])
        if self.status[seq] == "validating":
            self.status[seq] = "in_progress" if good else "failed"

    @precondition(lambda self: self.status)
    @rule(data=st.data(), count=st.integers(1, 4), ok=st.booleans())
    def answer(self, data, count, ok):
        """As the runner: only what is not answered; but it may be late."""
        seq = data.draw(st.sampled_from(list(self.status)))
        found = self.store.unanswered(seq, -1, count)
        self.store.add([Answer(seq, one.place, ok, f"{seq}/{one.place}", Usage(2, 1, 3)) for one in found])
        if self.status[seq] == "in_progress":
            self.answers[seq] |= {one.place: ok for one in found}

    @precondition(lambda self: self.status)
    @rule(data=st.data())
    def answer_twice(self, data):
        """All or nothing of a transaction: the one answer too many takes the others with it."""
        seq = data.draw(st.sampled_from(list(self.status)))
        found = self.store.unanswered(seq, -1, LINES)
        if self.status[seq] == "in_progress" and self.answers[seq] and found:
            places = [found[0].place, next(iter(self.answers[seq]))]
            with pytest.raises(sqlite3.IntegrityError):
                self.store.add([Answer(seq, place, True, "again", Usage()) for place in places])

    @precondition(lambda self: self.status)
    @rule(data=st.data())
    def cancel(self, data):
        seq = data.draw(st.sampled_from(list(self.status)))
        try:
            self.store.cancel("alice", self.store.work(seq).id)
        except ApiError:
            assert self.status[seq] in ("failed", "completed", "expired", "finalizing")
            return
        if self.status[seq] != "cancelled":
            self.status[seq] = "cancelling"

    @precondition(lambda self: "in_progress" in self.status.values() or "cancelling" in self.status.values())
    @rule(data=st.data(), ending=st.sampled_from(["completed", "expired"]))
    def end(self, data, ending):
        going = [seq for seq, status in self.status.items() if status in ("in_progress", "cancelling")]
        seq = data.draw(st.sampled_from(going))
        self.store.begin_end(seq, ending)
        batch = self.store.work(seq)
        self.status[seq] = batch.ending if self.status[seq] == "in_progress" else "cancelled"
        self.store.end(batch, None, None)
        while self.store.forget(seq):
            pass
        assert self.store.answered(seq, -1, 9) == []

    @rule(killed=st.booleans())
    def restart(self, killed):
        self.lives += 1
        directory = self.root / str(self.lives)
        if killed:
            shutil.copytree(self.root / str(self.lives - 1), directory)
            self.store.close()
        else:
            self.store.close()
            shutil.copytree(self.root / str(self.lives - 1), directory)
        self.store = opened(directory)

    @invariant()
    def is_as_it_should_be(self):
        going = ("validating", "in_progress", "cancelling", "finalizing")
        unfinished = [batch.seq for batch in self.store.unfinished()]
        assert unfinished == sorted(seq for seq, status in self.status.items() if status in going)
        for seq, status in self.status.items():
            batch = self.store.batch("alice", self.store.work(seq).id)
            known = self.answers[seq]
            assert batch["status"] == status
            assert batch["request_counts"]["completed"] == sum(known.values())
            assert batch["request_counts"]["failed"] == len(known) - sum(known.values())
            assert batch["usage"]["total_tokens"] == 5 * len(known)
            if status == "in_progress":
                kept = {one.place: ok for one, ok, text in self.store.answered(seq, -1, 9) if text is not None}
                assert kept == known
                assert {one.place for one in self.store.unanswered(seq, -1, 9)} == set(range(LINES)) - set(known)

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.root)


TestQueue = Queue.TestCase
TestQueue.settings = settings(
    max_examples=10, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_directory_belongs_to_one_server_at_a_time(tmp_path):
    store = opened(tmp_path)
    with pytest.raises(MachineError) as refused:
        opened(tmp_path)
    assert str(refused.value) == f"{tmp_path}: another server uses it; stop that server, or choose another --state"
    store.close()
    opened(tmp_path).close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("PRAGMA user_version = 7", "is no queue of version 1, found 7"),
        ("PRAGMA user_version = 0", "is no queue of version 1, found 0"),
    ],
)
def test_a_queue_of_another_version_is_not_touched(tmp_path, change, words):
    opened(tmp_path).close()
    rows = sqlite3.connect(tmp_path / "queue.sqlite")
    rows.execute(change)
    rows.close()
    for _ in range(2):  # and lets go of the directory
        with pytest.raises(DamagedError, match=words):
            opened(tmp_path)


def test_a_database_that_is_none_is_damaged(tmp_path):
    (tmp_path / "queue.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(DamagedError, match="is damaged"):
        opened(tmp_path)


def test_a_start_removes_only_files_of_its_own_that_have_no_row(tmp_path):
    store = opened(tmp_path)
    writer = store.files.begin()
    writer.publish()
    store.add_file("alice", writer.id, "batch", "in", 0)
    lost, half = store.files.begin(), store.files.begin()
    lost.publish()
    half.write(b"x")
    (tmp_path / "files" / "notes.txt").write_text("mine")
    store.close()
    opened(tmp_path).close()
    assert sorted(file.name for file in (tmp_path / "files").iterdir()) == [writer.id, "notes.txt"]
    half.discard()


def test_an_upload_that_finds_no_room_is_refused_and_leaves_nothing(queue, tmp_path):
    async def test(batches, asked):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, hard))
        try:
            with pytest.raises(ApiError) as refused:
                await upload(batches, ALICE, ["x" * (5 << 20)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (refused.value.status, refused.value.code) == (507, "insufficient_storage")
        assert str(tmp_path) not in refused.value.message
        assert list((tmp_path / "state" / "files").iterdir()) == []
        assert (await batches.list_files(ALICE, purpose=None, after=None, limit=9, descending=True))["data"] == []

    queue(test)


def test_a_full_database_refuses_uploads_and_makes_answers_wait_but_loses_none(queue, tmp_path, monkeypatch):
    monkeypatch.setattr("optkit.serve.batches.commits._AGAIN_SECONDS", 0.01)

    async def test(batches, asked):
        pages = lambda most: batches._db(lambda: batches._store._one(f"PRAGMA max_page_count = {most}"))  # noqa: E731
        asked.gate.clear()
        id = await create(batches, ALICE, [line(place, {"prompt": "x" * 20_000}) for place in range(4)])
        while asked.now < 4:
            await asyncio.sleep(0.001)
        await pages(1)
        asked.gate.set()
        while batches._runner._commits._task is None:
            await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            for _ in range(200):
                await upload(batches, ALICE, [line(1)], filename="x" * 200)
        assert refused.value.status == 507
        names = {file["id"] for file in (await _files(batches))["data"]}
        assert {file.name for file in (tmp_path / "state" / "files").iterdir()} == names
        assert (await batches.batch(ALICE, id))["status"] == "in_progress"
        await pages(1 << 30)
        batch = await ended(batches, ALICE, id)
        assert batch["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
        assert len(asked.asked) == 4  # nothing was computed again

    queue(test)


async def _files(batches):
    return await batches.list_files(ALICE, purpose=None, after=None, limit=1000, descending=True)


def test_answers_that_come_together_are_kept_together(queue):
    async def test(batches, asked):
        groups = []
        add = batches._store.add

        def counted(answers):
            groups.append(len(answers))
            add(answers)

        batches._store.add = counted
        asked.seats = 64
        batch = await ended(batches, ALICE, await create(batches, ALICE, [line(place) for place in range(256)]))
        assert batch["request_counts"]["completed"] == sum(groups) == 256
        assert len(groups) < 128

    queue(test)


def test_only_so_many_ended_batches_are_kept(queue):
    async def test(batches, asked):
        ids = []
        for _ in range(5):
            ids.append(await create(batches, ALICE, ["no json"]))
            await ended(batches, ALICE, ids[-1])
        listed = (await batches.list_batches(ALICE, after=None, limit=9))["data"]
        assert [one["id"] for one in listed] == ids[:1:-1]

    queue(test, quota=Quota(kept_batches=2))


def test_a_surrogate_in_a_custom_id_comes_back_as_it_was(queue):
    async def test(batches, asked):
        batch = await ended(batches, ALICE, await create(batches, ALICE, [line("\ud800")]))
        _, pieces = await batches.content(ALICE, batch["output_file_id"])
        assert json.loads(b"".join([piece async for piece in pieces]))["custom_id"] == "\ud800"

    queue(test)
