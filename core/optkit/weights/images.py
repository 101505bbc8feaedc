"""How a model's own files say that images become the numbers that it reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from optkit.errors import DamagedError, MissingError, RecipeError
from optkit.model import Model

__all__ = ["PREPARATION", "ImagePreparation", "labels_of", "pixels_of", "preparation_file"]

PREPARATION = "preprocessor_config.json"
"""What transformers' image processors are saved as."""
_CHANNELS = {1: "L", 3: "RGB"}
# Neither square nor of the size that any model reads.
_ODD = ((37, 53), (61, 29))


def preparation_file(folder: Path) -> dict[str, str]:
    """The file that says how images become pixels, by its name.

    Raises:
        DamagedError: it is not there, or cannot be read.
    """
    file = folder / PREPARATION
    if not file.is_file():
        raise DamagedError(
            f"no {PREPARATION}, so nothing says how images are prepared",
            where=str(folder),
            remedy="save the model's image processor beside it",
        )
    try:
        return {PREPARATION: file.read_text(encoding="utf-8")}
    except (OSError, ValueError) as error:
        raise DamagedError(f"not readable ({error})", where=str(file), remedy="get it again") from error


def pixels_of(config: Mapping[str, Any], text: str) -> tuple[int, int, int]:
    """About what a model reads, `[channels, height, width]`, told from its files alone; `ImagePreparation` knows.

    Args:
        config: the contents of its `config.json`.
        text: those of its `preprocessor_config.json`.

    Raises:
        ValueError: it is no JSON, or has no sizes.
    """
    preparation = json.loads(text)
    if not isinstance(preparation, dict):
        raise ValueError(f"{PREPARATION} is no JSON object")
    size = preparation.get("crop_size") if preparation.get("do_center_crop") else None
    size = size or preparation.get("size") or config.get("image_size") or 224
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge") or 224
        size = size.get("height", edge), size.get("width", edge)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(config.get("num_channels", 3)), int(height), int(width)


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a model's classes, in the order of its logits, from the contents of its `config.json`."""
    # transformers leaves its default out.
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names[key]) for key in sorted(names, key=int))


class ImagePreparation:
    """From an image to what a model reads, by the model's own image processor.

    Args:
        config: the contents of its `config.json`.
        files: holds the text of its `preprocessor_config.json`.

    Raises:
        RecipeError: it reads images of other than one or three channels.
        MissingError: Pillow is not installed.
        DamagedError: transformers knows no such image processor.
    """

    def __init__(self, config: Mapping[str, Any], files: Mapping[str, str]) -> None:
        channels = config.get("num_channels", 3)
        if channels not in _CHANNELS:
            raise RecipeError("reads images of other than one or three channels", where="config.json", found=channels)
        self._mode = _CHANNELS[channels]
        self._processor = _processor(config, files)
        self.labels = labels_of(config)

    @classmethod
    def of(cls, model: Model) -> Self:
        """That of a loaded model."""
        module: Any = model.module
        return cls(module.config.to_dict(), model.files)

    @classmethod
    def of_folder(cls, weights: Path) -> Self:
        """That of the model in a folder.

        Raises:
            DamagedError: a file is missing or cannot be read.
        """
        try:
            config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedError(f"not readable JSON ({error})", where=str(weights / "config.json")) from error
        return cls(config, preparation_file(weights))

    def __call__(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """What the model reads of an image `[height, width, 3]`: `[channels, height, width]`, always of one shape.

        Raises:
            DamagedError: the image processor refuses it, or gives NaN or infinite numbers.
        """
        from PIL import Image

        picture = Image.fromarray(image).convert(self._mode)
        try:
            [pixels] = self._processor(images=[picture], return_tensors="np")["pixel_values"]
        except (ValueError, TypeError, KeyError, OSError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise DamagedError(f"the model's image processor fails: {reason}", where=PREPARATION) from error
        found: npt.NDArray[np.float32] = np.ascontiguousarray(pixels, np.float32)
        if not np.isfinite(found).all():
            raise DamagedError("the model's image processor gives NaN or infinite numbers", where=PREPARATION)
        return found

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of every prepared image.

        Raises:
            RecipeError: it depends on the image, so that images could not share a batch.
        """
        shapes = [self(np.zeros((*size, 3), np.uint8)).shape for size in _ODD]
        if shapes[0] != shapes[1] or len(shapes[0]) != 3:
            raise RecipeError(
                "the model's image processor keeps the proportions of images, which then share no batch",
                where=PREPARATION,
                found=f"{shapes[0]} and {shapes[1]}",
                remedy="set do_center_crop with a crop_size, or a size with height and width",
            )
        channels, height, width = shapes[0]
        return channels, height, width


def _processor(config: Mapping[str, Any], files: Mapping[str, str]) -> Any:
    try:
        import PIL  # noqa: F401  # transformers says nothing of what is missing
    except ImportError as error:
        what = "images are prepared with Pillow"
        raise MissingError(what, where=PREPARATION, remedy="pip install 'optkit[vision]'") from error
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as scratch:
        # transformers reads folders only, and of old files needs to know the architecture.
        (Path(scratch) / PREPARATION).write_text(files[PREPARATION], encoding="utf-8")
        (Path(scratch) / "config.json").write_text(json.dumps({"model_type": config.get("model_type")}))
        try:
            return AutoImageProcessor.from_pretrained(scratch, backend="pil")
        except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise DamagedError(f"transformers has no such image processor ({reason})", where=PREPARATION) from error
