"""A small image classifier that really sees: that of examples/digits, and a random one of its shape."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from transformers import ResNetForImageClassification

EXAMPLE = Path(__file__).parents[1] / "examples/digits"
_train = runpy.run_path(str(EXAMPLE / "train.py"))
LEARNT, PIXELS, NAMES = _train["LEARNT"], _train["PIXELS"], _train["NAMES"]
digits, pixels, processor = _train["digits"], _train["pixels"], _train["processor"]
taught, write_images, main = _train["taught"], _train["write_images"], _train["main"]


def tiny_resnet() -> ResNetForImageClassification:
    """Random but equal at every call. Its batch norms have statistics that are not their first ones."""
    module = _train["resnet"]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.uniform_(-0.1, 0.1)
                part.running_var.uniform_(0.5, 2)
    return module.eval()


def save(module: ResNetForImageClassification, folder: Path) -> None:
    """As a Hugging Face folder, with the image processor."""
    module.save_pretrained(folder)
    processor(module.config.num_channels).save_pretrained(folder)
