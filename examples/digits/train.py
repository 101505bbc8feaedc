"""Teach a small ResNet the handwritten digits of scikit-learn, and write both down where `recipe.yaml` looks for them.

Usage: python examples/digits/train.py [FOLDER]; makes `model`, `train` and `test` in that folder, artifacts/digits
unless told otherwise, in a few seconds. Needs `pip install 'optkit[vision]' scikit-learn`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

LEARNT, PIXELS = 1297, 24
STEPS, ROWS, RATE = 200, 64, 5e-3
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits() -> tuple[Any, Any]:
    """`[1797, 8, 8]` uint8 and `[1797]`, in a random order that is always the same."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    return np.round(data.images[order] * 15.9375).astype(np.uint8), data.target[order]


def write_images(folder: Path) -> None:
    """`folder/train/CLASS/NUMBER.png` and `folder/test/...`."""
    images, labels = digits()
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = folder / ("train" if place < LEARNT else "test") / NAMES[label]
        split.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(split / f"{place:04}.png")


def resnet() -> ResNetForImageClassification:
    """Of two stages, in training mode, random but equal at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
            id2label=dict(enumerate(NAMES)),
            label2id={name: number for number, name in enumerate(NAMES)},
        )
        return ResNetForImageClassification(config).train()


def processor(channels: int = 1, **changes: Any) -> ViTImageProcessorPil:
    """What makes images into the model's pixels."""
    half = [0.5] * channels
    size = {"height": PIXELS, "width": PIXELS}
    return ViTImageProcessorPil(**{"size": size, "image_mean": half, "image_std": half, **changes})


def pixels(first: int, last: int) -> torch.Tensor:
    """Those digits as the model reads them, `[last - first, 1, PIXELS, PIXELS]`."""
    pictures = [Image.fromarray(image) for image in digits()[0][first:last]]
    return torch.from_numpy(np.stack(processor()(images=pictures, return_tensors="np")["pixel_values"]))


def taught() -> ResNetForImageClassification:
    """One that has learnt the training images."""
    module = resnet()
    learnt = pixels(0, LEARNT)
    classes = torch.from_numpy(digits()[1][:LEARNT]).long()
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(LEARNT, (ROWS,), generator=generator)
        loss = functional.cross_entropy(module(pixel_values=learnt[rows]).logits, classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
    return module.eval().requires_grad_(False)


def main() -> None:
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    folder = Path(*sys.argv[1:] or ["artifacts/digits"])
    if folder.exists():
        sys.exit(f"{folder}: is there already; remove it, or name another folder")
    write_images(folder)
    module = taught()
    module.save_pretrained(folder / "model")
    processor().save_pretrained(folder / "model")
    with torch.inference_mode():
        guesses = module(pixel_values=pixels(LEARNT, 1797)).logits.argmax(-1)
    right = (guesses.numpy() == digits()[1][LEARNT:]).mean()
    print(f"{folder}: a model that puts {right:.1%} of {len(guesses)} test images into their class")
    print("Next: optkit apply examples/digits/recipe.yaml --output artifacts/digits-int8")


if __name__ == "__main__":
    main()
