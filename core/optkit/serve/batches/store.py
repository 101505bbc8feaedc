"""The durable queue: which files, batches and answers there are. What a call has returned from survives everything."""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from optkit.artifact import writing
from optkit.errors import MachineError
from optkit.serve.batches.checking import Checked
from optkit.serve.batches.files import Files
from optkit.serve.batches.objects import Answer, Line, Work, batch_object, file_object, page
from optkit.serve.batches.quota import WINDOW_SECONDS, Quota
from optkit.serve.batches.schema import connect, translated, writing_rows
from optkit.serve.errors import ApiError

__all__ = ["Store"]

_ENDED = "('completed', 'failed', 'expired', 'cancelled')"
_PIECE = 500
"""Rows that are removed at a time, so that others get their turn between two pieces."""


class Store:
    """A queue in a directory. All calls must come from the thread that made it; they block.

    A killed process leaves what its last COMMIT left: SQLite rolls back the rest when it is opened again. Every method
    that changes something is one transaction.

    Args:
        directory: made if it is not there, for this user only. One process has it at a time.
        quota: of each tenant.
        now: gives unix seconds.

    Raises:
        MachineError: another server has it, or it cannot be written.
        DamagedError: it holds something else, or a queue of another version.
    """

    def __init__(self, directory: Path, quota: Quota, now: Callable[[], float]) -> None:
        self._quota, self._now = quota, now
        self._file = directory / "queue.sqlite"
        with writing(directory, remedy="choose another --state"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The kernel lets go of it when the process dies, however it does.
            self._lock = FileLock(directory / "lock", mode=0o600)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                remedy = "stop that server, or choose another --state"
                raise MachineError("another server uses it", where=str(directory), remedy=remedy) from None
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            self._rows = connect(self._file)
            stack.callback(self._rows.close)
            self.files = Files(directory / "files")
            self.files.sweep(row["id"] for row in self._all("SELECT id FROM files"))
            self._open = stack.pop_all()

    def close(self) -> None:
        """Let go of the directory."""
        self._open.close()

    # --- files

    def add_file(self, tenant: str, id: str, purpose: str, filename: str, size: int) -> dict[str, Any]:
        """Take an uploaded file that is on the disk.

        Raises:
            ApiError: the tenant has too many; the file is still the caller's.
        """
        with self._writing():
            self._check_room(tenant, size)
            self._insert_file(tenant, id, purpose, filename, size)
            return file_object(self._row("files", tenant, id))

    def file(self, tenant: str, id: str) -> dict[str, Any]:
        """Raises ApiError where the tenant has none of that id."""
        return file_object(self._row("files", tenant, id))

    def list_files(
        self, tenant: str, *, purpose: str | None, after: str | None, limit: int, descending: bool
    ) -> dict[str, Any]:
        """A page of them, by age. Raises ApiError where there is no file `after`."""
        where, values = "tenant = ?", [tenant]
        if purpose is not None:
            where, values = f"{where} AND purpose = ?", [*values, purpose]
        return page([file_object(row) for row in self._page("files", where, values, after, limit, descending)], limit)

    def delete_file(self, tenant: str, id: str) -> None:
        """Forget a file; the caller removes it afterwards, as the sweep of the next start would.

        Raises:
            ApiError: there is none, or a batch that has not ended reads it.
        """
        with self._writing():
            self._row("files", tenant, id)
            if self._all(f"SELECT 1 FROM batches WHERE input_file = ? AND status NOT IN {_ENDED}", id):  # noqa: S608
                # Not 409, which OpenAI's clients try again by themselves.
                raise ApiError(
                    400, "a batch that has not ended uses this file; cancel it first, or wait", code="file_in_use"
                )
            self._rows.execute("DELETE FROM files WHERE id = ?", (id,))

    # --- batches

    def create(
        self, tenant: str, salt: str, *, input_file: str, endpoint: str, metadata: Mapping[str, str] | None
    ) -> tuple[int, dict[str, Any]]:
        """Put a batch into the queue. Gives its place there, too.

        Raises:
            ApiError: there is no such file for batches, or the tenant has too many.
        """
        now, id = int(self._now()), f"batch_{secrets.token_hex(12)}"
        with self._writing():
            if self._row("files", tenant, input_file, "input_file_id")["purpose"] != "batch":
                raise ApiError(400, "the file was not uploaded with the purpose batch", param="input_file_id")
            self._check_room(tenant, 0)
            (waiting,) = self._one(
                f"SELECT count(*) FROM batches WHERE tenant = ? AND status NOT IN {_ENDED}",  # noqa: S608
                tenant,
            )
            if waiting >= self._quota.open_batches:
                message = f"{waiting} batches have not ended; wait for one of them, or cancel it"
                raise ApiError(429, message, kind="rate_limit_error", code="too_many_batches")
            self._rows.execute(
                "INSERT INTO batches (id, tenant, salt, input_file, endpoint, metadata, created_at, expires_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (id, tenant, salt, input_file, endpoint, _dumped(metadata), now, now + WINDOW_SECONDS),
            )
            self._rows.execute(
                f"DELETE FROM batches WHERE seq IN (SELECT seq FROM batches WHERE tenant = ? AND status IN {_ENDED} "  # noqa: S608
                "ORDER BY seq DESC LIMIT -1 OFFSET ?)",
                (tenant, self._quota.kept_batches),
            )
            row = self._row("batches", tenant, id)
        return row["seq"], batch_object(row)

    def batch(self, tenant: str, id: str) -> dict[str, Any]:
        """Raises ApiError where the tenant has none of that id."""
        return batch_object(self._row("batches", tenant, id))

    def list_batches(self, tenant: str, *, after: str | None, limit: int) -> dict[str, Any]:
        """A page of them, the newest first. Raises ApiError where there is no batch `after`."""
        rows = self._page("batches", "tenant = ?", [tenant], after, limit, True)
        return page([batch_object(row) for row in rows], limit)

    def cancel(self, tenant: str, id: str) -> tuple[int, dict[str, Any]]:
        """From now on no answer is taken. Gives the batch's place in the queue, too.

        Raises:
            ApiError: there is none, or it has ended or is about to.
        """
        with self._writing():
            row = self._row("batches", tenant, id)
            if row["status"] in ("validating", "in_progress"):
                self._set(row["seq"], status="cancelling", ending="cancelled", cancelling_at=int(self._now()))
            elif row["status"] not in ("cancelling", "cancelled"):
                message = f"a batch that is {row['status']} cannot be cancelled"
                raise ApiError(400, message, code="batch_not_cancellable")
            return row["seq"], batch_object(self._row("batches", tenant, id))

    # --- for the runner

    def unfinished(self) -> list[Work]:
        """Batches that have not ended, or whose lines are still there; the oldest first."""
        query = f"SELECT * FROM batches WHERE status NOT IN {_ENDED} OR seq IN (SELECT batch FROM lines) ORDER BY seq"  # noqa: S608
        return [_work(row) for row in self._all(query)]

    def work(self, seq: int) -> Work:
        """One of them, as it is now."""
        return _work(self._one("SELECT * FROM batches WHERE seq = ?", seq))

    def validated(self, seq: int, checked: Checked, faults: Sequence[Mapping[str, Any]]) -> None:
        """Begin with the answers, or say what is wrong with the input. No effect on a batch that was cancelled."""
        now = int(self._now())
        with self._writing():
            if self.work(seq).status != "validating":
                return
            if faults:
                self._set(seq, status="failed", failed_at=now, errors=json.dumps(faults), model=checked.model)
                return
            lines = zip(range(len(checked.starts)), checked.starts, checked.lengths, strict=True)
            self._rows.executemany(
                "INSERT INTO lines (batch, place, start, length) VALUES (?, ?, ?, ?)", ((seq, *line) for line in lines)
            )
            total = len(checked.starts)
            self._set(seq, status="in_progress", in_progress_at=now, model=checked.model, total=total)

    def unanswered(self, seq: int, after: int, limit: int) -> list[Line]:
        """The next lines of a batch, in order, that have no answer."""
        rows = self._all(
            "SELECT place, start, length, deaths FROM lines WHERE batch = ? AND place > ? AND NOT EXISTS "
            "(SELECT 1 FROM answers WHERE answers.batch = lines.batch AND answers.place = lines.place) "
            "ORDER BY place LIMIT ?",
            seq,
            after,
            limit,
        )
        return [Line(*row) for row in rows]

    def died(self, seq: int, place: int) -> int:
        """Note that a worker died over a line; gives how often that was."""
        with self._writing():
            self._rows.execute("UPDATE lines SET deaths = deaths + 1 WHERE batch = ? AND place = ?", (seq, place))
            (deaths,) = self._one("SELECT deaths FROM lines WHERE batch = ? AND place = ?", seq, place)
        return int(deaths)

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep answers, all in one transaction, and count them. Those of a batch that is ending are dropped."""
        with self._writing():
            for answer in answers:
                added = self._rows.execute(
                    "INSERT INTO answers SELECT ?, ?, ?, ? FROM batches WHERE seq = ? AND ending IS NULL",
                    (answer.batch, answer.place, answer.ok, answer.text, answer.batch),
                )
                if added.rowcount:
                    usage = answer.usage
                    self._rows.execute(
                        "UPDATE batches SET completed = completed + ?, failed = failed + ?, "
                        "input_tokens = input_tokens + ?, cached_tokens = cached_tokens + ?, "
                        "output_tokens = output_tokens + ?, reasoning_tokens = reasoning_tokens + ? WHERE seq = ?",
                        (
                            *(answer.ok, not answer.ok),
                            *(usage.input, usage.cached, usage.output, usage.reasoning),
                            answer.batch,
                        ),
                    )

    def begin_end(self, seq: int, ending: str) -> None:
        """From now on no answer is taken. No effect on a batch that was cancelled."""
        with self._writing():
            if self.work(seq).ending is None:
                self._set(seq, status="finalizing", ending=ending, finalizing_at=int(self._now()))

    def answered(self, seq: int, after: int, limit: int) -> list[tuple[Line, bool, str | None]]:
        """The next lines of a batch, in order, with whether all went well and the answer (None: there is none)."""
        rows = self._all(
            "SELECT place, start, length, deaths, ok, answer FROM lines LEFT JOIN answers USING (batch, place) "
            "WHERE batch = ? AND place > ? ORDER BY place LIMIT ?",
            seq,
            after,
            limit,
        )
        return [(Line(*row[:4]), bool(row["ok"]), row["answer"]) for row in rows]

    def end(self, batch: Work, output: tuple[str, int] | None, errors: tuple[str, int] | None) -> None:
        """Give a batch its last status and its files, which are on the disk: ids and sizes."""
        with self._writing():
            for kind, made in (("output", output), ("error", errors)):
                if made is not None:
                    self._insert_file(batch.tenant, made[0], "batch_output", f"{batch.id}_{kind}.jsonl", made[1])
            files = {"output_file": output and output[0], "error_file": errors and errors[0]}
            ended = {f"{batch.ending}_at": int(self._now())}
            self._set(batch.seq, status=batch.ending, **files, **ended)

    def forget(self, seq: int) -> bool:
        """Remove some lines and answers of a batch that has ended: its files have them. Gives whether any are left."""
        with self._writing():
            query = "DELETE FROM lines WHERE batch = ? AND place IN (SELECT place FROM lines WHERE batch = ? LIMIT ?)"
            return self._rows.execute(query, (seq, seq, _PIECE)).rowcount == _PIECE

    # --- rows

    def _check_room(self, tenant: str, size: int) -> None:
        count, total = self._one("SELECT count(*), coalesce(sum(bytes), 0) FROM files WHERE tenant = ?", tenant)
        if count >= self._quota.files or total + size > self._quota.total_bytes:
            message = f"there is room for {self._quota.files} files of {self._quota.total_bytes} bytes in all"
            raise ApiError(
                429, f"{message}; delete some that are not needed", kind="rate_limit_error", code="quota_exceeded"
            )

    def _insert_file(self, tenant: str, id: str, purpose: str, filename: str, size: int) -> None:
        self._rows.execute(
            "INSERT INTO files (id, tenant, purpose, filename, bytes, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            (id, tenant, purpose, filename, size, int(self._now())),
        )

    def _set(self, seq: int, **values: str | int | None) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        self._rows.execute(f"UPDATE batches SET {columns} WHERE seq = ?", (*values.values(), seq))  # noqa: S608

    def _row(self, table: str, tenant: str, id: str, param: str | None = None) -> sqlite3.Row:
        # Somebody else's id and no id at all are answered alike: nobody learns which ids there are.
        rows = self._all(f"SELECT * FROM {table} WHERE id = ? AND tenant = ?", id, tenant)  # noqa: S608
        if not rows:
            what = "file" if table == "files" else "batch"
            raise ApiError(404, f"there is no {what} with this id", param=param, code=f"{what}_not_found")
        return rows[0]

    def _page(
        self, table: str, where: str, values: list[str], after: str | None, limit: int, descending: bool
    ) -> list[sqlite3.Row]:
        order, than = ("DESC", "<") if descending else ("ASC", ">")
        known: list[str | int] = [*values]
        if after is not None:
            known.append(self._row(table, values[0], after, "after")["seq"])
            where = f"{where} AND seq {than} ?"
        query = f"SELECT * FROM {table} WHERE {where} ORDER BY seq {order} LIMIT ?"  # noqa: S608
        return self._all(query, *known, limit + 1)

    def _one(self, query: str, *values: str | int) -> sqlite3.Row:
        [row] = self._all(query, *values)
        return row

    def _all(self, query: str, *values: str | int) -> list[sqlite3.Row]:
        with translated(self._file):
            return self._rows.execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with translated(self._file), writing_rows(self._rows):
            yield


def _work(row: sqlite3.Row) -> Work:
    names = ("seq", "id", "tenant", "salt", "input_file", "endpoint", "model", "status", "ending", "expires_at")
    return Work(*(row[name] for name in names))


def _dumped(metadata: Mapping[str, str] | None) -> str | None:
    return None if metadata is None else json.dumps(metadata)
