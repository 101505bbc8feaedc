"""The process that `optkit.engine.supervision` starts: one model, and one client at the other end of a socket pair."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from optkit.engine import wire
from optkit.engine.opened import OpenedEngine, Speculation, open_engine
from optkit.engine.opened_tensors import OpenedTensors, open_tensors
from optkit.engine.outputs import Delta
from optkit.engine.request import SamplingParams
from optkit.engine.stepper import Stepper
from optkit.engine.tensor_stepper import TensorStepper
from optkit.engine.text import Prompt, encode
from optkit.errors import OptkitError, RequestError
from optkit.plugins import Plugins

__all__ = ["main"]

_LEAVE_SECONDS = 5.0
"""What the step under way may still take when the client has gone."""


def main() -> None:
    """Serve until the client closes its end, by will or by death.

    Arguments of the process: the number of the socket's descriptor, and the client's process id.
    """
    descriptor, parent = map(int, sys.argv[1:])
    # An interrupt is for the client, which then closes this process in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(parent)
    faulthandler.enable()
    # Libraries greet on stdout, which may be what the client is asked for.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with socket.socket(fileno=descriptor) as channel:
        _serve(channel.makefile("rb"), _Outbox(channel))
    sys.stderr.flush()
    # Not by way of Python's own end: it would wait for a thread in a step that never ends, or crash it.
    os._exit(0)


def _die_with(parent: int) -> None:
    """End this process when its parent is killed, also while it is busy opening a model and reads nothing."""
    set_death_signal = 1
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _serve(incoming: BinaryIO, outbox: _Outbox) -> None:
    message = _read(incoming)
    if message is None:
        return
    try:
        kind, path, block, *wishes = message
        served = _OPENINGS[kind](outbox, Path(path), Plugins.load(block=block), *wishes)
    except OptkitError as error:
        outbox.put("broken", wire.pack_error(error))
        outbox.drain()
        return
    # The model and the libraries stay as long as this process: no collection needs to look at them again.
    gc.collect()
    gc.freeze()
    outbox.put("ready", *served.facts)
    while (message := _read(incoming)) is not None:
        kind, *fields = message
        getattr(served, kind)(*fields)
    if served.stepper.close(_LEAVE_SECONDS):
        served.opened.close()
    else:
        os._exit(0)


def _read(incoming: BinaryIO) -> list[Any] | None:
    """The next message, or None when the client has gone."""
    try:
        header = incoming.read(wire.HEADER)
        if len(header) < wire.HEADER:
            return None
        size = wire.length(header)
        body = incoming.read(size)
        return wire.unpack(body) if len(body) == size else None
    except ConnectionError:
        return None


class _Served(ABC):
    """What a client can ask for: one method for each kind of message. Called by the thread that reads."""

    def __init__(self, outbox: _Outbox) -> None:
        self._outbox = outbox

    @property
    @abstractmethod
    def opened(self) -> OpenedEngine | OpenedTensors: ...

    @property
    @abstractmethod
    def stepper(self) -> Stepper | TensorStepper: ...

    @property
    @abstractmethod
    def facts(self) -> tuple[Any, ...]:
        """What `ready` says."""

    def cancel(self, key: int) -> None:
        self.stepper.cancel(key)

    def status(self, question: int) -> None:
        stepper = self.stepper
        self._outbox.put("answer", question, [asdict(stepper.stats), stepper.silent, stepper.failure])

    def _failed(self) -> None:
        # Its client starts another process, which nothing is wrong with.
        self._outbox.drain()
        sys.stderr.flush()
        os._exit(OptkitError.exit_code)


class _Language(_Served):
    """A causal language model.

    Prompts are encoded here, in the thread that reads, beside the steps and one after the other: a cancellation never
    overtakes its request.
    """

    def __init__(self, outbox: _Outbox, path: Path, plugins: Plugins, speculation: dict[str, Any] | None) -> None:
        super().__init__(outbox)
        wish = None if speculation is None else Speculation.model_validate(speculation)
        self._opened = open_engine(path, plugins, wish)
        self._tokenizer = self._opened.engine.tokenizer
        self._stepper = Stepper(self._opened.engine, outbox.deltas, self._failed)

    @property
    def opened(self) -> OpenedEngine:
        return self._opened

    @property
    def stepper(self) -> Stepper:
        return self._stepper

    @property
    def facts(self) -> tuple[Any, ...]:
        return self._opened.name, self._opened.max_length

    def submit(
        self, request: int, prompt: Prompt, params: str, priority: int, timeout: float | None, salt: str
    ) -> None:
        try:
            wish = SamplingParams.model_validate_json(params)
            tokens = encode(self._tokenizer, prompt)
            if not wire.fits(len(tokens), wish.prompt_logprobs):
                raise RequestError("the prompt's log probabilities are too many", remedy="lower prompt_logprobs")
        except Exception as error:
            self._outbox.put("refused", request, wire.pack_error(error))
            return
        accepted = self._stepper.submit(request, tokens, wish, priority=priority, timeout=timeout, salt=salt)
        accepted.add_done_callback(partial(self._answered, request, len(tokens)))

    def _answered(self, request: int, tokens: int, accepted: Future[None]) -> None:
        error = accepted.exception()
        if error is None:
            self._outbox.put("accepted", request, tokens)
        elif isinstance(error, Exception):
            self._outbox.put("refused", request, wire.pack_error(error))

    def encode(self, question: int, prompt: Prompt) -> None:
        try:
            self._outbox.put("answer", question, encode(self._tokenizer, prompt))
        except Exception as error:
            self._outbox.put("unanswered", question, wire.pack_error(error))


class _Tensors(_Served):
    """A model of one step."""

    def __init__(self, outbox: _Outbox, path: Path, plugins: Plugins) -> None:
        super().__init__(outbox)
        self._opened = open_tensors(path, plugins)
        self._stepper = TensorStepper(self._opened, partial(outbox.put, "begun"), self._deliver, self._failed)

    @property
    def opened(self) -> OpenedTensors:
        return self._opened

    @property
    def stepper(self) -> TensorStepper:
        return self._stepper

    @property
    def facts(self) -> tuple[Any, ...]:
        session = self._opened.session
        specs = ({name: astuple(spec) for name, spec in side.items()} for side in (session.inputs, session.outputs))
        return self._opened.name, self._opened.max_length, self._opened.texts is not None, *specs

    def embed(self, question: int, sequences: list[list[int]], normalize: bool | None) -> None:
        self._stepper.embed(question, [tuple(ids) for ids in sequences], normalize)

    def infer(self, question: int, arrays: dict[str, list[Any]]) -> None:
        self._stepper.infer(question, {name: wire.unpack_array(packed) for name, packed in arrays.items()})

    def _deliver(self, question: int, answer: Any) -> None:
        if isinstance(answer, Exception):
            self._outbox.put("unanswered", question, wire.pack_error(answer))
        else:
            self._outbox.put("answer", question, answer)


_OPENINGS: Mapping[str, Callable[..., _Served]] = {"open": _Language, "open_tensors": _Tensors}


class _Outbox:
    """Sends messages in the order in which they were put, from a thread of its own: a slow reader delays no step."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._messages: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="optkit-outbox", daemon=True)
        self._thread.start()

    def put(self, *message: Any) -> None:
        self._messages.put(message)

    def deltas(self, deltas: Sequence[Delta]) -> None:
        self._messages.put(("deltas", deltas))

    def drain(self) -> None:
        """Wait until everything is sent; nothing can be put after it."""
        self._messages.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                for frame in _frames(*message):
                    self._channel.sendall(frame)
        except OSError:  # the client has gone; the thread that reads finds out as well
            pass
        except BaseException as error:  # a bug; a client that hears no more must not wait
            traceback.print_exception(error)
            os._exit(OptkitError.exit_code)


def _frames(kind: str, *fields: Any) -> list[bytes]:
    match kind:
        case "deltas":
            return wire.delta_frames(*fields)
        case "answer":
            return [wire.answer_frame(*fields)]
        case _:
            return [wire.pack(kind, *fields)]


if __name__ == "__main__":
    main()
