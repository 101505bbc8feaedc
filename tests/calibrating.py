"""What tests of calibrating transforms share: random texts, a silent context, and how far a model moved."""

from __future__ import annotations

import torch
from torch import nn

from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.transforms import TransformContext


def texts(*lengths: int, vocabulary: int = 50) -> Calibration:
    """Batches of one text each, of so many random tokens."""
    torch.manual_seed(1)
    rows = [torch.randint(5, vocabulary, (1, length)) for length in lengths]
    return Calibration(tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows))


def context(calibration: Calibration, checkpoint: Checkpoint | None = None) -> TransformContext:
    """Of a run whose progress nobody sees."""
    return TransformContext(lambda *_: None, calibration, checkpoint or Checkpoint())


def distance(module: nn.Module, exact: torch.Tensor, tokens: torch.Tensor) -> float:
    """Of a model's output to the exact one, relative to it."""
    return ((module(tokens)[0] - exact).norm() / exact.norm()).item()
