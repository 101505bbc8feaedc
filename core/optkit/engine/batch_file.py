"""Offline answers to a file of requests: survives `kill -9` at any moment, and answers nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from optkit.artifact import open_artifact, writing
from optkit.engine.batch_lines import Counts, Input, Line, answers_all, check, recorded
from optkit.engine.openai import (
    BODIES,
    LanguageBody,
    error_body,
    invalid,
)
from optkit.engine.openai import answer as answer_of
from optkit.engine.opened import OpenedEngine, Speculation, open_engine
from optkit.engine.outputs import Collector, Completion, Delta
from optkit.engine.text import encode
from optkit.errors import MachineError, RecipeError, RequestError
from optkit.locations import cache_root
from optkit.plugins import Plugins

__all__ = ["BatchOutcome", "run_batch"]

Progress = Callable[[str, int, int, str], None]

_SYNC_SECONDS = 0.5
"""Answers that a power failure may cost. The death of the process costs none that was written."""


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What a batch came to, all its runs together."""

    output: Path
    lines: int
    resumed: int
    """Lines that were answered before this run."""
    counts: Counts
    seconds: float
    """Of this run."""


def run_batch(
    artifact: Path,
    source: Path,
    output: Path,
    plugins: Plugins | None = None,
    *,
    overwrite: bool = False,
    speculation: Speculation | None = None,
    progress: Progress | None = None,
) -> BatchOutcome:
    """Answer every request of a file, in its order.

    Answers go to `output` with `.partial` after its name as they come, and a run that was broken off goes on from
    there; `output` itself appears whole. What is wrong with a single request's body is that request's answer.

    Args:
        artifact: its directory.
        source: requests, one a line, in OpenAI's batch format.
        output: where the answers go.
        plugins: that hold the artifact's backend and batching strategy; by default all that are installed.
        overwrite: replace what stands at `output`. An unfinished run over the same requests is still gone on with.
        speculation: guess several tokens and check them in one step; the output stays the same.
        progress: called with `"batch"`, answered lines, all lines, and how many failed.

    Raises:
        RequestError: a line is no request; nothing was begun.
        RecipeError: `source` cannot be read, or `output` holds something else.
        MachineError: `output` cannot be written, or another run is writing it.
        OptkitError: as `optkit.engine.opened.open_engine`.
    """
    began = time.monotonic()
    manifest = open_artifact(artifact, verify=False).manifest
    known = check(source, manifest.digest)
    partial = output.with_name(f"{output.name}.partial")
    with _alone(output), writing(output, remedy="choose another output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        done = None if overwrite else _standing(output, partial, known)
        if done is not None:
            return BatchOutcome(output, len(known), len(known), done, time.monotonic() - began)
        if overwrite and partial.exists() and not _continues(partial, known):
            partial.unlink()
        partial.touch()
        offsets, counts = recorded(partial, known)
        resumed = len(known) - offsets.count(-1)
        with _Record(partial, offsets, counts, progress) as record:
            if resumed < len(known):
                with open_engine(artifact, plugins, speculation) as opened:
                    left = (line for line in known.lines() if offsets[line.place] < 0)
                    window = max(16, 4 * manifest.max_batch_size)
                    _Run(opened, record, window, f"optkit-{manifest.digest[:12]}").work(left)
        _publish(partial, output, offsets)
    return BatchOutcome(output, len(known), resumed, counts, time.monotonic() - began)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    directory = cache_root() / "locks"
    with writing(directory, "the cache"):
        directory.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(output.resolve())).hexdigest()
    lock = FileLock(directory / f"batch-{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise MachineError(
            "another optkit batch is writing it", where=str(output), remedy="wait for it, or choose another output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _standing(output: Path, partial: Path, known: Input) -> Counts | None:
    """The counts of what stands at `output`, if anything does."""
    if not output.exists():
        return None
    done = answers_all(output, known) if output.is_file() else None
    if done is None:
        raise RecipeError(
            f"holds something else than answers to {known.file} by this artifact",
            where=str(output),
            remedy="choose another output, or add --overwrite",
        )
    partial.unlink(missing_ok=True)
    return done


def _continues(partial: Path, known: Input) -> bool:
    try:
        recorded(partial, known)
    except RecipeError:
        return False
    return True


def _publish(partial: Path, output: Path, offsets: array[int]) -> None:
    """Write the answers in the order of the requests, and make them the output in one step."""
    whole = output.with_name(f"{output.name}.whole")
    with partial.open("rb") as answers, whole.open("wb") as stream:
        for offset in offsets:
            answers.seek(offset)
            stream.write(answers.readline())
        stream.flush()
        os.fsync(stream.fileno())
    whole.replace(output)
    directory = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    partial.unlink()


class _Record:
    """The file of answers so far."""

    def __init__(self, file: Path, offsets: array[int], counts: Counts, progress: Progress | None) -> None:
        self._stream = file.open("ab")
        self._offsets, self._counts, self._progress = offsets, counts, progress
        self._done = len(offsets) - offsets.count(-1)
        self._synced, self._dirty = time.monotonic(), False
        self._tell()

    def add(self, place: int, answer: dict[str, Any]) -> None:
        """Keep one answer: from now on the death of this process does not lose it."""
        start = self._stream.tell()
        self._stream.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
        self._stream.flush()
        self._offsets[place] = start
        self._counts.add(answer)
        self._done += 1
        self._dirty = True
        self._tell()

    def sync(self) -> None:
        """See to it that not even a power failure loses what was kept a while ago."""
        if self._dirty and time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced, self._dirty = time.monotonic(), False

    def _tell(self) -> None:
        if self._progress is not None:
            failed = self._counts.failed
            self._progress("batch", self._done, len(self._offsets), f"{failed} failed" if failed else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()


@dataclass(slots=True)
class _Job:
    """One line that is being answered; it has several prompts if its body has."""

    line: Line
    body: LanguageBody
    prompts: list[tuple[int, ...]]
    requests: list[int] = field(default_factory=list)
    completions: dict[int, Completion] = field(default_factory=dict)


class _Run:
    """Feeds the engine from a stream of lines, never more than a window of them."""

    def __init__(self, opened: OpenedEngine, record: _Record, window: int, fingerprint: str) -> None:
        self._engine, self._tokenizer = opened.engine, opened.engine.tokenizer
        self._name, self._max_length, self._fingerprint = opened.name, opened.max_length, fingerprint
        self._record, self._window = record, window
        self._open: dict[int, tuple[_Job, Collector]] = {}

    def work(self, lines: Iterator[Line]) -> None:
        """Answer them all."""
        while True:
            while len(self._open) < self._window and (line := next(lines, None)) is not None:
                self._start(line)
            if not self._open:
                return
            for delta in self._engine.step():
                self._take(delta)
            self._record.sync()
            if self._engine.wait:
                time.sleep(self._engine.wait)

    def _start(self, line: Line) -> None:
        job: _Job | None = None
        try:
            body = BODIES[line.url].model_validate(line.body)
            if body.stream:
                raise RequestError("stream: a batch file has nobody to stream to")
            job = _Job(line, body, [encode(self._tokenizer, prompt) for prompt in body.prompts()])
            for prompt in job.prompts:
                params = body.params(len(prompt), self._max_length, self._tokenizer)
                job.requests.append(self._engine.add(prompt, params))
                self._open[job.requests[-1]] = job, Collector(params, len(prompt))
        except (ValidationError, RequestError) as error:
            self._drop(job)
            self._answer(line, 400, invalid(error))

    def _drop(self, job: _Job | None) -> None:
        for request in [] if job is None else job.requests:
            if self._open.pop(request, None) is not None:
                self._engine.cancel(request)

    def _take(self, delta: Delta) -> None:
        if delta.request not in self._open:  # of a line that another of its prompts ended
            return
        job, collector = self._open[delta.request]
        completion = collector.add(delta)
        if completion is None:
            return
        del self._open[delta.request]
        if completion.error:
            self._drop(job)
            self._answer(job.line, 500, error_body(completion.error, kind="server_error"))
            return
        job.completions[delta.request] = completion
        if len(job.completions) == len(job.prompts):
            self._answer(job.line, 200, self._body(job))

    def _body(self, job: _Job) -> dict[str, Any]:
        head = {
            "id": f"{job.body.prefix}{job.line.id}",
            "created": int(time.time()),
            "model": job.body.model or self._name,
            "system_fingerprint": self._fingerprint,
        }
        completions = [job.completions[request] for request in job.requests]
        return answer_of(job.body, job.prompts, completions, self._tokenizer, **head)

    def _answer(self, line: Line, status: int, body: dict[str, Any]) -> None:
        response = {"status_code": status, "request_id": line.id, "body": body}
        answer = {"id": line.id, "custom_id": line.custom_id, "response": response, "error": None}
        self._record.add(line.place, answer)
