"""A runtime that batches by itself: a session of the torch backend under optkit's own loop, in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import asdict, fields

from optkit.backends import EngineCaps, EngineSession, Sampling
from optkit.engine import Engine, Request, SamplingParams
from optkit.errors import MachineError
from optkit.evaluate import SessionScorer
from optkit_backends.torch import Torch
from optkit_batching.continuous import Continuous

EVERYTHING = frozenset(field.name for field in fields(Sampling))


class BatchingSession(EngineSession):
    """Runs any `TokenSession` with continuous batching.

    Args:
        session: which it closes.
        sampling: what it says that it honours; it honours everything.
    """

    def __init__(self, session, sampling=EVERYTHING):
        self.session, self.engine = session, Engine(session, Continuous(max_batch_size=session.caps.max_batch_size))
        caps = session.caps
        self.caps = EngineCaps(caps.vocab_size, caps.max_length, caps.max_batch_size, sampling)
        self.fault = None
        """What the next step raises, which ends the engine."""
        self.refused = None
        """A first token whose prompts are refused when they come."""
        self._streams, self._orders = {}, []
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def submit(self, request):
        if request.prompt[0] == self.refused:
            raise ValueError("not this one")
        loop, news, identity = asyncio.get_running_loop(), asyncio.Queue(), []
        params = SamplingParams(
            max_tokens=request.max_tokens,
            stop_token_ids=tuple(request.stop_tokens),
            ignore_eos=True,
            **asdict(request.sampling),
        )

        def begin():
            identity.append(self.engine.add(Request(request.prompt, params)))
            self._streams[identity[0]] = loop, news

        self._order(begin)
        try:
            while True:
                what = await news.get()
                if isinstance(what, Exception):
                    raise what
                if what.token is not None:
                    yield what.token
                if what.last:
                    return
        finally:
            if not self._closed:
                self._order(lambda: self.engine.cancel(identity[0]))

    def scores(self, tokens):
        return SessionScorer(self.session).logits(tuple(tokens))

    def close(self):
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self.session.close()

    def _order(self, order):
        with self._changed:
            if self._closed:
                raise MachineError("the runtime is closed")
            self._orders.append(order)
            self._changed.notify()

    def _run(self):
        error = MachineError("the runtime was closed")
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._orders or self.engine.busy or self._closed)
                    if self._closed:
                        break
                    orders, self._orders = self._orders, []
                for order in orders:
                    order()
                if self.fault is not None:
                    raise self.fault
                for event in self.engine.step():
                    self._put(event.request, event)
                    if event.last:
                        del self._streams[event.request]
        except Exception as fault:
            error = MachineError(f"the runtime broke ({fault})")
            self._closed = True
        for request in self._streams:
            self._put(request, error)

    def _put(self, request, what):
        loop, news = self._streams[request]
        with contextlib.suppress(RuntimeError):  # its reader's loop was closed
            loop.call_soon_threadsafe(news.put_nowait, what)


class BatchingTorch(Torch):
    """The torch backend in such a runtime."""

    max_batch_size: int = 4

    @property
    def own_batch_size(self):
        return self.max_batch_size

    def open(self, runtime, weights, limits):
        return BatchingSession(super().open(runtime, weights, limits))
