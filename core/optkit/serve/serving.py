"""Everything that one server process holds, from its start to its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from optkit.serve.answering import Answering
from optkit.serve.batches import Batches, Quota
from optkit.serve.models import Models
from optkit.serve.observing.metrics import Metrics
from optkit.serve.observing.tracing import tracer_for
from optkit.serve.settings import Settings

__all__ = ["Serving"]

_log = logging.getLogger(__name__)


class Serving:
    """Used as an async context manager: entering loads the models, leaving unloads them.

    Args:
        settings: of the server.
        models: that it knows.
        load: names of those that are loaded at its start; the others can be loaded later.
    """

    def __init__(self, settings: Settings, models: Models, load: tuple[str, ...]) -> None:
        self.settings, self.models = settings, models
        self.metrics = Metrics()
        self.answering = Answering(models, self.metrics, settings.request_timeout)
        self.tracing = tracer_for(settings.otlp_endpoint)
        self.batches: Batches | None = None
        self.draining = False
        """Whether new work is refused, because the server is about to end."""
        self.open = 0
        """Requests that are being answered."""
        self._load = load
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Load the models and go on with the batches that an earlier process left.

        Raises:
            OptkitError: an artifact cannot be opened, or the state directory belongs to another process.
        """
        async with AsyncExitStack() as stack:
            if self.tracing is not None:
                stack.push_async_callback(self.tracing.close)
            stack.push_async_callback(self.models.close)
            for name in self._load:
                began = time.monotonic()
                await self.models.load(name)
                _log.info("%s is ready after %.1f s", name, time.monotonic() - began)
            if self.settings.state is not None:
                quota = Quota(file_bytes=self.settings.max_file_bytes, line_bytes=self.settings.max_body_bytes)
                self.batches = await Batches.open(
                    self.settings.state, self.answering.answer, self.models.window, quota=quota
                )
                stack.push_async_callback(self.batches.close)
            # What is there now stays: no collection needs to look at it again while requests wait.
            gc.collect()
            gc.freeze()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.draining = True
        await self._stack.aclose()

    def drain(self) -> None:
        """Refuse new work from now on. Batches stop where they are; a later process goes on with them."""
        if not self.draining:
            self.draining = True
            _log.info("draining: %d requests are open", self.open)
            if self.batches is not None:
                self._pausing = asyncio.ensure_future(self.batches.pause())

    async def break_off(self) -> None:
        """End open requests with an error."""
        _log.warning("%d requests are broken off", self.open)
        await self.models.close()
