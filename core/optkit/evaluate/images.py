"""From a dataset's images to the pixels that a model is judged on and learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optkit.datasets import LabelledImage
from optkit.errors import RecipeError
from optkit.weights import ImagePreparation

__all__ = ["Pictures", "class_numbers", "evenly", "prepared", "unseen"]

Floats = npt.NDArray[np.float32]
_UNKNOWN = -1


@dataclass(frozen=True, eq=False, slots=True)
class Pictures:
    """Prepared images with their classes."""

    pixels: Floats
    """`[images, channels, height, width]` float32."""
    labels: npt.NDArray[np.int64]
    """`[images]`: places in the model's logits; all -1 where classes are unknown."""

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def labelled(self) -> bool:
        """Whether the classes are known."""
        return bool((self.labels != _UNKNOWN).all())


def class_numbers(names: Iterable[str | None], labels: Sequence[str]) -> Mapping[str | None, int]:
    """What the classes of a dataset are in a model's logits.

    Args:
        names: of the dataset's classes: those of the model, or its numbers; None where a class is unknown.
        labels: the model's, in the order of its logits.

    Raises:
        RecipeError: a class is none of the model's.
    """
    found: dict[str | None, int] = {}
    for name in dict.fromkeys(names):
        if name is None:
            found[name] = _UNKNOWN
        elif name in labels:
            found[name] = labels.index(name)
        elif name.isdecimal() and name.isascii() and int(name) < len(labels):
            found[name] = int(name)
        else:
            some = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
            raise RecipeError(
                f"the dataset has a class that is none of the model's {len(labels)} ({some})",
                found=name,
                remedy="name folders as the model names its labels, or by their numbers",
            )
    return found


def evenly(images: Sequence[LabelledImage], count: int) -> list[LabelledImage]:
    """So many of them, at even distances over all; all where there are fewer."""
    count = min(count, len(images))
    return [images[place * len(images) // count] for place in range(count)]


def prepared(images: Sequence[LabelledImage], preparation: ImagePreparation) -> Pictures:
    """Read images and prepare them for a model.

    Raises:
        RecipeError: see `class_numbers`.
        DamagedError: one is no image, or the model's image processor refuses it.
    """
    numbers = class_numbers((image.label for image in images), preparation.labels)
    pixels = np.empty((len(images), *preparation.shape), np.float32)
    for place, image in enumerate(images):
        pixels[place] = preparation(image.read())
    return Pictures(pixels, np.array([numbers[image.label] for image in images], np.int64))


def unseen(
    images: Sequence[LabelledImage], preparation: ImagePreparation, judged: Pictures, samples: int, seed: int = 0
) -> Floats:
    """Images to learn from, drawn at random, none of which a model is judged on.

    Args:
        images: the whole dataset; classes are not looked at.
        preparation: of the model.
        judged: those of the evaluation. An image that becomes the same pixels as one of them is left out.
        samples: how many.
        seed: of the order in which they are drawn.

    Returns:
        `[samples, channels, height, width]` float32.

    Raises:
        RecipeError: fewer are left.
        DamagedError: see `prepared`.
    """
    known = {_digest(pixels) for pixels in judged.pixels}
    found: list[Floats] = []
    seen = 0
    for place in np.random.default_rng(seed).permutation(len(images)):
        pixels = preparation(images[place].read())
        if _digest(pixels) in known:
            seen += 1
            continue
        found.append(pixels)
        if len(found) == samples:
            return np.stack(found)
    beside = f", besides {seen} that the evaluation uses" if seen else ""
    raise RecipeError(
        f"the calibration dataset has {len(found)} images{beside}",
        found=samples,
        remedy="lower calibration.samples or evaluation.images, or choose a larger dataset",
    )


def _digest(pixels: Floats) -> bytes:
    return hashlib.sha256(pixels.tobytes()).digest()
