"""Where a model comes from."""

from __future__ import annotations

from abc import abstractmethod

from optkit.model import Model, ModelCard
from optkit.options import Options

__all__ = ["Source"]


class Source(Options):
    """A place that a model can be loaded from."""

    @abstractmethod
    def inspect(self) -> ModelCard:
        """The model's facts, read from headers only: no weights, no torch.

        Raises:
            MissingError: the file, folder or package is not there.
            DamagedError: it is there and not in its format.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over the bytes that `load` reads, in hexadecimal."""

    @abstractmethod
    def load(self) -> Model:
        """The model in float32 on the CPU, in evaluation mode, with its tokenizer."""
