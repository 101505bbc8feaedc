"""Which samples of which requests have not ended, so that whatever happens every one of them ends once."""

from __future__ import annotations

from optkit.engine.outputs import Delta
from optkit.engine.request import FinishReason

__all__ = ["Ledger"]


class Ledger:
    """The open requests of one engine, from the outside. Not thread-safe."""

    def __init__(self) -> None:
        self._open: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request: int) -> bool:
        return request in self._open

    def enter(self, request: int, samples: int) -> None:
        """A request was accepted; it ends `samples` times."""
        self._open[request] = set(range(samples))

    def leave(self, request: int) -> None:
        """A request was refused after all."""
        self._open.pop(request, None)

    def note(self, delta: Delta) -> None:
        """A delta went out."""
        if delta.last:
            self._open.pop(delta.request, None)
        elif delta.finished is not None and delta.request in self._open:
            self._open[delta.request].discard(delta.sample)

    def end(self, reason: FinishReason, error: str = "") -> list[Delta]:
        """End all that is open, and give the deltas that say so: nothing else will."""
        deltas = []
        for request, samples in self._open.items():
            left = sorted(samples) or [0]
            deltas += [
                Delta(request, sample, "", (), finished=reason, last=sample == left[-1], error=error) for sample in left
            ]
        self._open.clear()
        return deltas
