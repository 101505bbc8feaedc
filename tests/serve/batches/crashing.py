"""Run as a program: kills itself at every step that matters, one after the other, and looks at what comes after.

Usage: crashing.py points DIRECTORY FIRST STRIDE   every so many points of a whole life, in forks of this process
       crashing.py serve DIRECTORY LINES           one life, until the batch has ended or somebody kills it
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import sys
from pathlib import Path

from optkit.serve.batches import Batches
from optkit.serve.errors import ApiError
from optkit.serve.guard.keys import Tenant

ALICE = Tenant("alice", "salt", False)
BOUNDARY = "x"


class Steps:
    """Counts the steps that put something on the disk, and dies right before one of them."""

    def __init__(self, last: int) -> None:
        self.count, self.last = 0, last

    def around(self, function):
        def counted(*args, **kwargs):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    def watch(self) -> None:
        """From now on."""
        os.fsync, os.rename, os.unlink = self.around(os.fsync), self.around(os.rename), self.around(os.unlink)
        Path.unlink, Path.rename = self.around(Path.unlink), self.around(Path.rename)
        steps, connect = self, sqlite3.connect

        class Counting(sqlite3.Connection):
            def execute(self, sql, *args):
                if sql == "COMMIT" or sql.startswith(("INSERT", "UPDATE", "DELETE")):
                    return steps.around(super().execute)(sql, *args)
                return super().execute(sql, *args)

        sqlite3.connect = lambda *args, **kwargs: connect(*args, **kwargs, factory=Counting)


async def life(directory: Path, lines: int, pace: float = 0.0) -> dict:
    """One start of a server: uploads and creates what is not there, and waits until the batch has ended."""
    log = os.open(directory / "computed", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    async def answer(url, body, *, tenant, priority=0, record=None):
        os.write(log, f"{body['prompt']}\n".encode())  # one write: kill -9 does not take it back
        await asyncio.sleep(pace * random.random())
        if body["prompt"] % 10 == 7:
            raise ApiError(400, "no sevens")
        return {"echo": body["prompt"]}

    batches = await Batches.open(directory / "state", answer, lambda model: 8)
    try:
        listed = (await batches.list_batches(ALICE, after=None, limit=20))["data"]
        if not listed:
            files = (await batches.list_files(ALICE, purpose="batch", after=None, limit=9, descending=True))["data"]
            file = files[0]["id"] if files else await upload(batches, lines)
            listed = [await batches.create(ALICE, input_file=file, endpoint="/v1/completions", metadata=None)]
        [batch] = listed
        while batch["status"] not in ("completed", "failed"):
            await asyncio.sleep(0.001)
            batch = await batches.batch(ALICE, batch["id"])
        return batch
    finally:
        await batches.close()
        os.close(log)


async def upload(batches: Batches, lines: int) -> str:
    requests = "".join(
        json.dumps(
            {"custom_id": f"line {place}", "method": "POST", "url": "/v1/completions", "body": {"prompt": place}}
        )
        + "\n"
        for place in range(lines)
    )
    head = 'Content-Disposition: form-data; name="'
    body = f'--x\r\n{head}purpose"\r\n\r\nbatch\r\n--x\r\n{head}file"; filename="in"\r\n\r\n{requests}\r\n--x--\r\n'

    async def chunks():
        yield body.encode()

    return (await batches.upload(ALICE, "multipart/form-data; boundary=x", chunks()))["id"]


def committed(directory: Path) -> set[int]:
    """Places of lines whose answers a transaction has kept, whatever became of the process."""
    file = directory / "state" / "queue.sqlite"
    if not file.exists():
        return set()
    rows = sqlite3.connect(file)
    try:
        return {place for (place,) in rows.execute("SELECT place FROM answers")}
    except sqlite3.OperationalError:  # killed before there was a table
        return set()
    finally:
        rows.close()


def computed(directory: Path) -> list[int]:
    """Places of lines that were computed, in order, over all lives."""
    log = directory / "computed"
    return [int(one) for one in log.read_text().split()] if log.exists() else []


def check(directory: Path, lines: int, batch: dict) -> None:
    """Every line is answered, once; and every file has a row, and every row a file."""
    assert batch["status"] == "completed", batch
    sevens = [place for place in range(lines) if place % 10 == 7]
    counts = {"total": lines, "completed": lines - len(sevens), "failed": len(sevens)}
    assert batch["request_counts"] == counts, batch
    state = directory / "state"
    found = {}
    for name in ("output_file_id", "error_file_id"):
        if batch[name] is not None:
            found[name] = [json.loads(one) for one in (state / "files" / batch[name]).read_text().splitlines()]
    places = {name: [int(one["custom_id"].split()[1]) for one in answers] for name, answers in found.items()}
    assert places.get("output_file_id", []) == [place for place in range(lines) if place % 10 != 7], places
    assert places.get("error_file_id", []) == sevens, places
    assert all(one["response"]["body"]["echo"] == int(one["custom_id"].split()[1]) for one in found["output_file_id"])
    rows = sqlite3.connect(state / "queue.sqlite")
    named = dict(rows.execute("SELECT id, bytes FROM files").fetchall())
    assert rows.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    rows.close()
    assert {file.name: file.stat().st_size for file in (state / "files").iterdir()} == named


def forked(work) -> int:
    """What became of a process that did it: its exit status, negative for a signal."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def points(root: Path, start: int, stride: int, lines: int = 8) -> None:
    """Die at one step, at a later one, ...; a second life must always end well, and compute nothing twice."""
    for last in range(start, 10_000, stride):
        directory = root / str(last)
        directory.mkdir()

        def first(directory=directory, last=last):
            Steps(last).watch()
            asyncio.run(life(directory, lines))

        died = forked(first) == -signal.SIGKILL
        kept, before = committed(directory), len(computed(directory))

        def second(directory=directory):
            check(directory, lines, asyncio.run(life(directory, lines)))

        assert forked(second) == 0, f"after a death at step {last}"
        again = set(computed(directory)[before:])
        assert not kept & again, f"after a death at step {last}: {sorted(kept & again)} were computed again"
        if not died:
            sys.stdout.write(str(last))
            return


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["points", directory, start, stride]:
            points(Path(directory), int(start), int(stride))
        case ["serve", directory, lines]:
            batch = asyncio.run(life(Path(directory), int(lines), 0.02))
            check(Path(directory), int(lines), batch)
            sys.stdout.write(json.dumps(batch))
