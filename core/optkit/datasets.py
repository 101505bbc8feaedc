"""Text that a model is evaluated on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from optkit.options import Options

__all__ = ["Dataset"]


class Dataset(Options):
    """A sequence of texts in an order that never changes."""

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """The documents, one string each.

        Raises:
            MissingError: the data is not on this machine.
            DamagedError: it is not text.
        """
