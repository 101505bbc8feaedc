"""Files and batches, for the event loop: the store and its thread, and the runner that works on it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optkit.errors import MachineError
from optkit.serve.batches.files import Writer
from optkit.serve.batches.quota import Quota
from optkit.serve.batches.runner import Answers, Runner
from optkit.serve.batches.seats import Window
from optkit.serve.batches.store import Store
from optkit.serve.batches.threads import Threads
from optkit.serve.batches.upload import Upload
from optkit.serve.errors import ApiError
from optkit.serve.guard.keys import Tenant

__all__ = ["Batches"]

_PIECE = 1 << 20
"""Bytes that are written or read at a time."""
_DISK_THREADS = 4
"""Uploads, downloads and lines that wait for the disk at once."""


class Batches:
    """What `/v1/files` and `/v1/batches` do. Made by `open`.

    Every method raises ApiError for what is the client's fault, and where the disk has no room.
    """

    def __init__(self, store: Store, db: Threads, disk: Threads, runner: Runner, quota: Quota) -> None:
        self._store, self._db, self._disk, self._runner, self._quota = store, db, disk, runner, quota
        self._closed = False

    @classmethod
    async def open(
        cls,
        directory: Path,
        answer: Answers,
        window: Window,
        *,
        quota: Quota | None = None,
        now: Callable[[], float] = time.time,
    ) -> Batches:
        """Open a queue, and go on with what has not ended.

        Args:
            directory: made if it is not there, for this user only. One server has it at a time.
            answer: answers the bodies of lines.
            window: how many lines of a model may be with its engine at once.
            quota: bounds of each tenant's files and batches.
            now: gives unix seconds.

        Raises:
            MachineError: another server has the directory, or it cannot be written.
            DamagedError: it holds something else, or a queue of another version.
        """
        quota, db, disk = quota or Quota(), Threads(1), Threads(_DISK_THREADS)
        try:
            store = await db(Store, directory, quota, now)
        except BaseException:
            db.close()
            raise
        runner = Runner(store, db, disk, answer, window, quota, now)
        await runner.start()
        return cls(store, db, disk, runner, quota)

    async def pause(self) -> None:
        """Take back what is with the engines, and begin nothing more. Files and batches can still be read and made."""
        await self._runner.close()

    async def close(self) -> None:
        """Pause, and let go of the directory. Everything goes on at the next start. A second time has no effect."""
        await self.pause()
        if not self._closed:
            self._closed = True
            await self._db(self._store.close)
            self._db.close()
            self._disk.close()

    # --- files

    async def upload(self, tenant: Tenant, content_type: str | None, body: AsyncIterator[bytes]) -> dict[str, Any]:
        """Take a form with the fields `file` and `purpose`."""
        upload, waiting = Upload(content_type, self._store.files, self._quota.file_bytes), bytearray()
        with _room():
            try:
                async for chunk in body:
                    waiting += chunk
                    if len(waiting) >= _PIECE:
                        await self._disk(upload.feed, bytes(waiting))
                        waiting.clear()
                await self._disk(upload.feed, bytes(waiting))
                writer = upload.end()
                _check_fields(upload.fields)
                await self._disk(writer.publish)
            except BaseException:
                await self._disk(upload.discard)
                raise
            return await self._db(self._adopt, tenant.name, writer, upload.filename)

    def _adopt(self, tenant: str, writer: Writer, filename: str) -> dict[str, Any]:
        # In one go in one thread, so that no cancellation comes between: a row without a file must never be.
        try:
            return self._store.add_file(tenant, writer.id, "batch", filename, writer.size)
        except BaseException:
            writer.discard()
            raise

    async def list_files(
        self, tenant: Tenant, *, purpose: str | None, after: str | None, limit: int, descending: bool
    ) -> dict[str, Any]:
        """A page of them."""
        return await self._db(
            self._store.list_files, tenant.name, purpose=purpose, after=after, limit=limit, descending=descending
        )

    async def file(self, tenant: Tenant, id: str) -> dict[str, Any]:
        """One of them."""
        return await self._db(self._store.file, tenant.name, id)

    async def content(self, tenant: Tenant, id: str) -> tuple[int, AsyncGenerator[bytes, None]]:
        """How many bytes it has, and the bytes."""
        size = (await self.file(tenant, id))["bytes"]
        try:
            opened = self._store.files.open(id)
        except FileNotFoundError as error:  # deleted just now
            raise ApiError(404, "there is no file with this id", code="file_not_found") from error

        async def pieces() -> AsyncGenerator[bytes, None]:
            with opened as stream:
                while piece := await self._disk(stream.read, _PIECE):
                    yield piece

        return size, pieces()

    async def delete_file(self, tenant: Tenant, id: str) -> dict[str, Any]:
        """Remove it."""
        with _room():
            await self._db(self._store.delete_file, tenant.name, id)
        with suppress(OSError):  # it is gone for everybody; the next start sweeps what is left
            await self._disk(self._store.files.remove, id)
        return {"id": id, "object": "file", "deleted": True}

    # --- batches

    async def create(
        self, tenant: Tenant, *, input_file: str, endpoint: str, metadata: Mapping[str, str] | None
    ) -> dict[str, Any]:
        """Queue a batch."""
        with _room():
            seq, batch = await self._db(
                self._store.create,
                tenant.name,
                tenant.salt,
                input_file=input_file,
                endpoint=endpoint,
                metadata=metadata,
            )
        self._runner.add(seq)
        return batch

    async def list_batches(self, tenant: Tenant, *, after: str | None, limit: int) -> dict[str, Any]:
        """A page of them, the newest first."""
        return await self._db(self._store.list_batches, tenant.name, after=after, limit=limit)

    async def batch(self, tenant: Tenant, id: str) -> dict[str, Any]:
        """One of them."""
        return await self._db(self._store.batch, tenant.name, id)

    async def cancel(self, tenant: Tenant, id: str) -> dict[str, Any]:
        """Stop it; what is answered is kept."""
        with _room():
            seq, batch = await self._db(self._store.cancel, tenant.name, id)
        self._runner.stop(seq)
        return batch


def _check_fields(fields: Mapping[str, str]) -> None:
    for name in fields:
        if name != "purpose":
            raise ApiError(400, "the form has a field that this server does not know", param=name)
    if fields.get("purpose") != "batch":
        raise ApiError(400, "purpose must be batch", param="purpose")


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except MachineError as error:
        message = "the server has no room to keep this"
        raise ApiError(507, message, kind="server_error", code="insufficient_storage") from error
