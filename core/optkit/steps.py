"""The data that scheduler and runtime exchange for one step of a model. Plain data, no torch.

There is no "prefill" and no "decode": each row brings the tokens that are not in its KV cache yet, and a row's computed
tokens catch up with its total. A slot is a block whose size is the maximum length, so one vocabulary covers paged and
slotted KV caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Caps", "KernelTime", "Limits", "Row", "StepPlan", "StepResult", "TensorSpec"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a session must be able to hold; the batching strategy and the recipe decide it."""

    max_batch_size: int
    """Sequences that are alive at once."""
    max_length: int
    """Tokens of one sequence, prompt and output together."""
    kv_cache_tokens: int | None = None
    """Tokens that the KV cache holds in all. None: as many as `max_batch_size` sequences of `max_length` can use, or
    as measured free memory allows, whichever is less."""


@dataclass(frozen=True, slots=True)
class Caps:
    """What a session can do. A batcher plans within it."""

    kv: Literal["paged", "slot", "none"]
    """`slot`: each sequence owns one block of `block_size` tokens, its maximum length. `none`: a model of one step,
    such as an encoder, which keeps nothing between steps."""
    block_size: int
    """Tokens in one block; 0 for `none`."""
    blocks: int
    """Blocks in all; 0 for `none`."""
    max_batch_size: int
    """Rows in one step."""
    mixed: bool
    """Whether one step may mix rows with many new tokens and rows with one."""
    vocab_size: int
    max_length: int
    """Tokens of one sequence, prompt and output together."""


class Row(NamedTuple):
    """One sequence's share of a step. Rows, like shares and events, are made by the thousand: tuples cost least."""

    sequence: int
    """Identifies the sequence between steps."""
    tokens: tuple[int, ...]
    """The new token ids, at least one."""
    computed: int
    """Tokens of the sequence that are in its KV cache already; the new ones get the positions from here on."""
    blocks: tuple[int, ...]
    """The blocks that hold the sequence's KV, in order; they cover `computed + len(tokens)` tokens, or more."""
    logits: Literal["none", "last", "all"] = "last"
    """Which new positions need logits: none (a chunk that does not end the prompt), the last, or all (scoring)."""
    padding: int = 0
    """So many of `tokens`, at their end, are filler: computed, never asked for, and overwritten by what comes next."""

    @property
    def wanted(self) -> range:
        """Places in `tokens` whose logits are needed."""
        real = len(self.tokens) - self.padding
        return range({"none": real, "last": real - 1, "all": 0}[self.logits], real)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One call of the model: at least one row, each of another sequence."""

    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What `execute` gives back."""

    logits: tuple[npt.NDArray[np.float32], ...]
    """One array per row of the plan, `[positions, vocabulary]` float32, with 0, 1 or `len(tokens)` positions."""


@dataclass(frozen=True, slots=True)
class KernelTime:
    """Measured time of one kernel in one step or call."""

    layer: str
    """Module path of the layer, or the name of the operation where it belongs to no module."""
    kernel: str
    """What ran, as the runtime calls it."""
    seconds: float
    weight_bytes: int = field(default=0)
    """Bytes of weights that the kernel must read, 0 if unknown or none."""
    operations: int = field(default=0)
    """Multiplications and additions of its product with weights, 0 if unknown or none."""
    integer: bool = field(default=False)
    """Whether those are of int8, which processors have faster instructions for."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one input or output of a model of one step is."""

    dtype: str
    """As numpy names it: "int64", "float32"."""
    shape: tuple[int | None, ...]
    """None where any size is taken. The first axis is the batch."""
