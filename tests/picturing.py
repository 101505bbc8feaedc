"""A small image classifier that really sees: handwritten digits of scikit-learn, learnt in a few seconds."""

from __future__ import annotations

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


def tiny_resnet(channels: int = 1, hidden: tuple[int, int] = (16, 32)) -> ResNetForImageClassification:
    """Of two stages, random but equal at every call. Its batch norms have statistics that are not their first ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(
            num_channels=channels,
            embedding_size=hidden[0],
            hidden_sizes=list(hidden),
            depths=[1, 1],
            layer_type="basic",
            id2label=dict(enumerate(NAMES)),
            label2id={name: number for number, name in enumerate(NAMES)},
        )
        module = ResNetForImageClassification(config)
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.uniform_(-0.1, 0.1)
                part.running_var.uniform_(0.5, 2)
    return module.eval()


def processor(channels: int = 1, **changes: Any) -> ViTImageProcessorPil:
    """What makes images into its pixels."""
    half = [0.5] * channels
    size = {"height": PIXELS, "width": PIXELS}
    return ViTImageProcessorPil(**{"size": size, "image_mean": half, "image_std": half, **changes})


def save(module: ResNetForImageClassification, folder: Path) -> None:
    """As a Hugging Face folder, with the image processor."""
    module.save_pretrained(folder)
    processor(module.config.num_channels).save_pretrained(folder)


def pixels(first: int, last: int) -> torch.Tensor:
    """Those digits as a model of gray images reads them, `[last - first, 1, PIXELS, PIXELS]`."""
    pictures = [Image.fromarray(image) for image in digits()[0][first:last]]
    return torch.from_numpy(np.stack(processor()(images=pictures, return_tensors="np")["pixel_values"]))


def taught() -> ResNetForImageClassification:
    """One that has learnt the training images."""
    module = tiny_resnet()
    learnt = pixels(0, LEARNT)
    classes = torch.from_numpy(digits()[1][:LEARNT]).long()
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(0)
    module.train()
    for _ in range(STEPS):
        rows = torch.randint(LEARNT, (ROWS,), generator=generator)
        loss = functional.cross_entropy(module(pixel_values=learnt[rows]).logits, classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval().requires_grad_(False)
