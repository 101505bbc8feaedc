"""A compiled decoder as a session: its package, and keys and values in paged blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from optkit.steps import Limits
from optkit_backends.aot_inductor.files import PROFILED, PackagedDecoder, load
from optkit_backends.graphs.session import GraphSession
from optkit_backends.graphs.timing import Profiled

__all__ = ["AOTInductorSession"]


class AOTInductorSession(GraphSession):
    """Runs what `compile_decoder` wrote; see `optkit.backends.TokenSession`.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
        MachineError: the package is for another machine or version of torch.
        RecipeError: sequences of `limits.max_length` are longer than the package's rotary angles hold for.
    """

    PROFILED: ClassVar[Profiled] = PROFILED

    def __init__(self, directory: Path, limits: Limits) -> None:
        facts = PackagedDecoder.read(directory)
        facts.check(limits)
        self._package: Any = load(directory, facts)
        super().__init__(limits, facts.shapes, facts.windows, facts.products, facts.vocab_size)

    def _call(self, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self._package(*inputs)[0]
        return logits

    def close(self) -> None:
        self._package = None
        super().close()
