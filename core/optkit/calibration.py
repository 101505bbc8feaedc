"""What transforms that learn from data run the model on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Calibration"]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Batches of data that evaluation never sees."""

    inputs: tuple[Mapping[str, Tensor], ...] = ()
    """Keyword arguments of the model's `forward`, one mapping a batch, on the CPU. Language models and encoders get
    `input_ids` and `attention_mask` `[1, tokens]` int64, without padding; image classifiers `pixel_values`
    `[rows, channels, height, width]` float32."""

    @property
    def samples(self) -> int:
        """Rows of all batches."""
        return sum(len(next(iter(batch.values()))) for batch in self.inputs)

    @property
    def tokens(self) -> int:
        """Tokens of all batches; 0 where there are none."""
        return sum(batch["input_ids"].numel() for batch in self.inputs if "input_ids" in batch)
