"""What tests of calibrating transforms share: random texts, a silent context, layers and real models to judge by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from optkit.builtin.gguf import GGUF
from optkit.builtin.texts import PythonReference
from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.evaluate import every_window, held_out, windows
from optkit.model import Model
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


def problem(rows: int, features: int, seed: int, kind: str = "normal") -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[rows, features]`, and the Hessian of inputs that depend on each other.

    `kind` is normal, or what is odd: zero row, constant, outlier (weights), dead, few, silent (inputs).
    """
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, features))
    inputs = random.normal(size=(2 * features, features)) @ random.normal(size=(features, features))
    inputs *= np.exp(random.normal(size=features))
    match kind:
        case "zero row":
            weight[-1] = 0
        case "constant":
            weight[:] = 0.5
        case "outlier":
            weight[0, 0] = 1000
        case "dead":
            inputs[:, :: max(features // 4, 1)] = 0
        case "few":
            inputs = inputs[:3]
        case "silent":
            inputs[:] = 0
    x = torch.from_numpy(inputs).float()
    return torch.from_numpy(weight).float(), 2 * x.T @ x / len(x)


class RealModel:
    """A language model in a GGUF file, with text to learn from and text to judge by that have nothing in common.

    Args:
        file: the model.
        samples: windows of 512 tokens to learn from; 4,096 tokens are judged.
    """

    def __init__(self, file: Path, samples: int) -> None:
        self._file = file
        tokenizer, dataset = self.load().tokenizer, PythonReference()
        self._judged = windows(tokenizer, dataset, 4096, 512)
        learnt = held_out(every_window(tokenizer, dataset, 512), self._judged, samples)
        rows = [torch.tensor([window]) for window in learnt]
        self.calibration = Calibration(
            tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows)
        )

    def load(self) -> Model:
        """A fresh one."""
        return GGUF(file=str(self._file)).load()

    def log_perplexity(self, model: Model) -> float:
        """In nats per token."""
        losses = []
        for window in self._judged:
            tokens = torch.tensor([window])
            with torch.no_grad():
                logits = model.module(tokens, use_cache=False).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
        return torch.stack(losses).mean().item()
