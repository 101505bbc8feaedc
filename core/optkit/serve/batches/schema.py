"""The database of a queue: how it is opened, what it holds, and what its errors mean."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optkit.errors import DamagedError, MachineError

__all__ = ["connect", "translated", "writing_rows"]

_VERSION = 1

_TABLES = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice, so that pages of a list stay in order
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    purpose TEXT NOT NULL CHECK (purpose IN ('batch', 'batch_output')),
    filename TEXT NOT NULL,                 -- the client's words; never a path
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;
CREATE INDEX files_of_tenant ON files (tenant, seq);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    salt TEXT NOT NULL,
    input_file TEXT NOT NULL,               -- may be deleted once the batch has ended
    endpoint TEXT NOT NULL,
    model TEXT,
    metadata TEXT,
    status TEXT NOT NULL DEFAULT 'validating',
    ending TEXT,                            -- from here on no answer is taken
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    output_file TEXT,
    error_file TEXT,
    errors TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER
) STRICT;
CREATE INDEX batches_of_tenant ON batches (tenant, seq);
CREATE TABLE lines (
    batch INTEGER NOT NULL REFERENCES batches (seq) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    start INTEGER NOT NULL,
    length INTEGER NOT NULL,
    deaths INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE answers (
    batch INTEGER NOT NULL,
    place INTEGER NOT NULL,
    ok INTEGER NOT NULL,
    answer TEXT NOT NULL,
    PRIMARY KEY (batch, place),             -- a line has one answer
    FOREIGN KEY (batch, place) REFERENCES lines (batch, place) ON DELETE CASCADE
) STRICT;
"""

_NO_ROOM = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
_NO_ROOM |= {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOMEM}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_SCHEMA}


def connect(file: Path) -> sqlite3.Connection:
    """Open a queue's database, or make it. To be used in the calling thread only.

    Raises:
        DamagedError: the file is no such database, or one of another version.
        MachineError: it cannot be read or written.
    """
    with translated(file):
        # SQLite gives its journal the permissions of the database.
        file.touch(mode=0o600, exist_ok=True)
        connection = sqlite3.connect(file, isolation_level=None)
        try:
            _prepare(connection, file)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, file: Path) -> None:
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA busy_timeout = 5000")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA journal_mode = WAL")
    # NORMAL would lose the last transactions in a power failure: with FULL, COMMIT returns when they are on the disk.
    connection.execute("PRAGMA synchronous = FULL")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if version == 0 and not tables:
        with writing_rows(connection):
            for statement in _TABLES.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_VERSION}")
    elif version != _VERSION:
        raise DamagedError(
            f"is no queue of version {_VERSION}",
            where=str(file),
            found=version,
            remedy="choose another --state, or use the optkit that wrote it",
        )


@contextmanager
def writing_rows(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction: all of it is on the disk after the context, or nothing of it ever."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors, a full disk among them, have rolled back already
            connection.execute("ROLLBACK")
        raise


@contextmanager
def translated(file: Path) -> Iterator[None]:
    """SQLite's errors, and the file system's, in our words.

    Raises:
        MachineError: no room, no permission, or the disk fails.
        DamagedError: the database is no database.
    """
    try:
        yield
    except OSError as error:
        raise MachineError(f"cannot be written ({error.strerror})", where=str(file)) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says more about it
        if code in _NO_ROOM:
            remedy = "free some space, or choose another --state"
            raise MachineError(f"cannot be written ({error})", where=str(file), remedy=remedy) from error
        if code in _DAMAGED:
            raise DamagedError(f"is damaged ({error})", where=str(file), remedy="choose another --state") from error
        raise
