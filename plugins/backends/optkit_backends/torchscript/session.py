"""A compiled decoder as a session: its archive, and keys and values in paged blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from optkit.steps import Limits
from optkit_backends.graphs.session import GraphSession
from optkit_backends.graphs.timing import Profiled
from optkit_backends.torchscript.files import PROFILED, ArchivedDecoder, load, running

__all__ = ["TorchScriptSession"]


class TorchScriptSession(GraphSession):
    """Runs what `compile_decoder` wrote; see `optkit.backends.TokenSession`.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
        RecipeError: sequences of `limits.max_length` are longer than the archive's rotary angles hold for.
    """

    PROFILED: ClassVar[Profiled] = PROFILED

    def __init__(self, directory: Path, limits: Limits) -> None:
        facts = ArchivedDecoder.read(directory)
        facts.check(limits)
        self._module: Any = load(directory, facts.torch)
        super().__init__(limits, facts.shapes, facts.windows, facts.products, facts.vocab_size)

    def _call(self, inputs: tuple[Tensor, ...]) -> Tensor:
        with running():
            logits: Tensor = self._module(*inputs)[0]
        return logits

    def close(self) -> None:
        self._module = None
        super().close()
