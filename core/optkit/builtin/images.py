"""Datasets of images."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from optkit.builtin.files import locate
from optkit.datasets import ImageDataset, LabelledImage
from optkit.errors import DamagedError, MissingError

__all__ = ["ImageFolder"]

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# More than 8 bits a sample, which converting would clip.
_DEEP = ("I", "F")


class ImageFolder(ImageDataset):
    """Image files in one folder for each class, as in Hugging Face's `imagefolder`: `PATH/cat/1.png`, `PATH/dog/2.png`.

    The folders are called as the model's labels are (`id2label` in its `config.json`), or by their numbers. Images
    right in PATH have no class: a model is then compared with its original, and its accuracy is not measured. Whatever
    Pillow reads, in 8 bits a sample; images of grays and with transparency become RGB, and turned ones are set upright.
    Of an animation the first image counts.

    Layout: https://huggingface.co/docs/datasets/image_dataset
    """

    path: str
    """The folder of one split: a path, or `package:NAME/inner/folder` in an installed Python package."""

    def images(self) -> Sequence[LabelledImage]:
        if importlib.util.find_spec("PIL") is None:
            raise MissingError("images are read with Pillow", where=self.path, remedy="pip install 'optkit[vision]'")
        return [
            LabelledImage(None if file.parent == self._folder else file.parent.name, partial(_read, file))
            for file in self._files()
        ]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self._files():
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{file.relative_to(self._folder)}\0{content}\0".encode())
        return digest.hexdigest()

    @property
    def _folder(self) -> Path:
        return locate(self.path)

    def _files(self) -> list[Path]:
        folder = self._folder
        if not folder.is_dir():
            raise MissingError("is no folder", where=self.path, remedy="name the folder that holds the images")
        loose, classes = _pictures(folder), [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
        found = {entry: _pictures(entry) for entry in classes if not entry.name.startswith(".")}
        labelled = [file for files in found.values() for file in files]
        if loose and labelled:
            what = "holds images beside folders of them, so that some have a class and some have none"
            raise DamagedError(what, where=self.path, found=loose[0].name, remedy="put it into a folder, or elsewhere")
        if not loose and not labelled:
            split = next((entry for entry in found if any(map(_pictures, _folders(entry)))), None)
            kinds = ", ".join(sorted(suffix.removeprefix(".") for suffix in _SUFFIXES))
            remedy = f"name one split, {split}" if split else f"put {kinds} files into it, or into one folder a class"
            raise MissingError("holds no images", where=self.path, remedy=remedy)
        return loose or labelled


def _folders(folder: Path) -> Iterable[Path]:
    return (entry for entry in folder.iterdir() if entry.is_dir())


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())


def _read(file: Path) -> npt.NDArray[np.uint8]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image.mode.startswith(_DEEP):
                raise ValueError(f"samples of the mode {image.mode}, optkit reads 8 bits")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DamagedError(
            f"not a readable image ({reason})", where=str(file), remedy="remove it, or get it again"
        ) from error
