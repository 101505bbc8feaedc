"""An encoder, or any model of one step, in a process of its own; see `optkit.engine.supervision`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from optkit.engine import wire
from optkit.engine.async_engine import Health
from optkit.engine.one_step import TensorStats
from optkit.engine.supervision import Lost, Supervision
from optkit.errors import MachineError
from optkit.plugins import Plugins
from optkit.steps import TensorSpec

__all__ = ["WorkerTensors"]

Floats = npt.NDArray[np.float32]


class WorkerTensors:
    """An artifact of a model of one step, in a process of its own; everything happens in one event loop.

    Many tasks use it at once, and share batches as the artifact's strategy says. When the process dies, what it was
    asked ends with an error, at once; a new process is started, and what is asked next waits for it. While one after
    the other dies soon after it opened the artifact, requests are refused. Used as an async context manager.

    ```python
    async with WorkerTensors("artifacts/encoder") as encoder:
        rows = await encoder.embed([(101, 7592, 102)])
    ```

    Args:
        path: the artifact's directory. `start` opens it.
        plugins: the process leaves out those that these leave out; it finds installed plugins only.
        patience: seconds after which a single step counts as hung, in `health`. Opening a model is no step.
    """

    def __init__(self, path: str | Path, *, plugins: Plugins | None = None, patience: float = 60.0) -> None:
        opening = ("open_tensors", str(path), [] if plugins is None else plugins.blocked)
        self._worker = Supervision(opening, patience, opened=self._opened)
        self.name = ""
        """Of the artifact; this and what follows is known once it was opened."""
        self.max_length = 0
        """Tokens of one sequence, for a text encoder."""
        self.encoder = False
        """Whether it is a text encoder, which `embed` needs."""
        self.inputs: Mapping[str, TensorSpec] = {}
        self.outputs: Mapping[str, TensorSpec] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the worker, if one runs."""
        return self._worker.pid

    async def start(self) -> None:
        """Start the process and wait until the artifact is open; entering the context does it.

        Raises:
            OptkitError: as `optkit.engine.opened_tensors.open_tensors` in that process.
            MachineError: the process died on its way.
        """
        await self._worker.start()

    async def close(self) -> None:
        """Forget what is open, and end the process. Closing twice does nothing."""
        await self._worker.close()

    async def health(self) -> Health:
        """How it is; answers also when nothing else does."""
        return await self._worker.health()

    async def stats(self) -> TensorStats:
        """Counters. A worker that was replaced begins at 0."""
        await self._worker.ready(None)
        counters, _, _ = await self._worker.ask("status")
        return TensorStats(**counters)

    async def embed(
        self, sequences: Sequence[tuple[int, ...]], *, normalize: bool | None = None, timeout: float | None = None
    ) -> Floats:
        """Embed sequences of token ids. Cancelling it cancels what has not begun.

        Args:
            sequences: at least one; see `optkit.engine.encoder.EncoderText`.
            normalize: whether embeddings have length 1; by default what the model's files say.
            timeout: seconds.

        Returns:
            `[sequences, hidden]` float32, in their order.

        Raises:
            RequestError: a sequence is empty, too long or holds unknown tokens; the model is no text encoder; what is
                sent, or the answer, is larger than a message can be.
            MachineError: the model failed on a sequence, the worker died over it, is closed or dies again and again,
                or `timeout` is over.
        """
        rows: Floats = _own(await self._compute("embed", sequences, normalize, timeout=timeout))
        return rows

    async def infer(
        self, inputs: Mapping[str, npt.NDArray[np.generic]], *, timeout: float | None = None
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Run some rows through the model. Cancelling it cancels what has not begun.

        Args:
            inputs: as the attribute `inputs` says; the first axis is the batch.
            timeout: seconds.

        Returns:
            The outputs by name, as many rows.

        Raises:
            RequestError: the model does not take these, or not so many rows; what is sent, or the answer, is larger
                than a message can be.
            MachineError: as `embed`.
        """
        outputs = await self._compute("infer", dict(inputs), timeout=timeout)
        return {name: _own(packed) for name, packed in outputs.items()}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _compute(self, kind: str, *fields: Any, timeout: float | None) -> Any:
        end = None if timeout is None else time.monotonic() + timeout
        try:
            return await self._hand_over(kind, *fields, end=end)
        except Lost:
            # Nothing came of it, so it can have another process; only one, as it may be what kills them.
            return await self._hand_over(kind, *fields, end=end)

    async def _hand_over(self, kind: str, *fields: Any, end: float | None) -> Any:
        await self._worker.ready(end)
        try:
            async with asyncio.timeout(None if end is None else end - time.monotonic()):
                return await self._worker.ask(kind, *fields, cancelled="cancel")
        except TimeoutError:
            raise MachineError("the model did not answer in time", remedy="allow it more") from None

    def _opened(self, name: str, max_length: int, encoder: bool, *specs: Mapping[str, list[Any]]) -> None:
        self.name, self.max_length, self.encoder = name, max_length, encoder
        self.inputs, self.outputs = (
            {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in side.items()} for side in specs
        )


def _own(packed: list[Any]) -> Any:
    return wire.unpack_array(packed).copy()  # its caller may write to it
