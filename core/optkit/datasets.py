"""What a model is evaluated on, and what transforms learn from: text, or images."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from optkit.options import Options

__all__ = ["Dataset", "ImageDataset", "LabelledImage", "TextDataset"]


class Dataset(Options):
    """Data in an order that never changes; a `TextDataset` or an `ImageDataset`."""

    holds: ClassVar[str]
    """In a word."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over all of it, in hexadecimal: its options do not say what is in a file.

        Raises:
            MissingError, DamagedError: see `TextDataset.texts` and `ImageDataset.images`.
        """


class TextDataset(Dataset):
    """A sequence of texts."""

    holds = "text"

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """The documents, one string each.

        Raises:
            MissingError: the data is not on this machine.
            DamagedError: it is not text.
        """

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for text in self.texts():
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image, which is read when it is needed."""

    label: str | None
    """The name of its class; None where nobody knows it."""
    read: Callable[[], npt.NDArray[np.uint8]]
    """Gives `[height, width, 3]`: red, green and blue, equal in an image of grays. Raises DamagedError where it is no
    image."""


class ImageDataset(Dataset):
    """A sequence of images, of any sizes, with their classes or without."""

    holds = "images"

    @abstractmethod
    def images(self) -> Sequence[LabelledImage]:
        """All of them, none read yet.

        Raises:
            MissingError: the data is not on this machine, or holds no image.
            DamagedError: it is not laid out as it should be.
        """

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for image in self.images():
            pixels = image.read()
            digest.update(f"{image.label!r} {pixels.shape}\0".encode() + pixels.tobytes())
        return digest.hexdigest()
