"""Runtimes: what compiles a model, and the sessions that run it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from optkit.model import Model, ModelCard
from optkit.options import Options
from optkit.steps import Caps, KernelTime, Limits, StepPlan, StepResult, TensorSpec

__all__ = ["Backend", "Lowering", "Session", "TensorSession", "TokenSession"]


@dataclass(frozen=True, slots=True)
class Lowering:
    """What becomes of one weight format on one backend."""

    kernel: str
    """The kernel that will run it, as the runtime calls it; empty when none can."""
    native: bool
    """Whether the kernel reads the stored format. False: the weights are dequantized first, so only files shrink."""
    tolerance: float = 1e-3
    """Largest distance of this kernel's logits from the transformed model's, as a fraction of their norm."""
    reason: str = ""
    """Why no kernel can run it, or what the user should know about the one that does."""

    @property
    def possible(self) -> bool:
        return bool(self.kernel)


class Backend(Options):
    """Compiles a transformed model into files, and opens those files on any machine that has the runtime."""

    extra: ClassVar[str] = ""
    """The extra of optkit, or the distribution, that installs the runtime."""

    @abstractmethod
    def unavailable(self) -> str | None:
        """What is missing on this machine and how to get it, or None. Imports nothing heavy."""

    @abstractmethod
    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        """For each `weights:*`, `activations:*` and `kv:*` tag the kernel that will run it or why none can.

        From the tags alone. A format that it does not mention cannot run.
        A missing architecture or task stands under its own tag, for example `arch:mamba`.
        """

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        """Estimated peak memory of `compile` and `open` together, above the loaded model, in bytes."""
        return weight_bytes

    @abstractmethod
    def compile(self, model: Model, directory: Path) -> None:
        """Write what `open` needs into the empty `directory`. No pickle."""

    @abstractmethod
    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession | TensorSession:
        """A session over what `compile` wrote into `runtime`, beside the artifact's `weights` folder.

        Raises:
            DamagedError: the files cannot be what `compile` wrote.
            MachineError: not enough memory for `limits`.
        """


class Session(ABC):
    """A compiled model, ready to run. Not thread-safe. Used as a context manager, or closed."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory and files. Closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TokenSession(Session):
    """A causal language model, one step at a time."""

    caps: Caps

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step: append each row's new tokens to its KV cache, and give the logits that the plan asks for.

        What a row's blocks held beyond its `computed` tokens is overwritten. A step that raised can be run again, whole
        or in parts.
        """

    @abstractmethod
    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.generic]:
        """Keys and values of some blocks, copied to host memory: `[blocks, ...]`, whatever layout suits the session."""

    @abstractmethod
    def write_blocks(self, blocks: Sequence[int], contents: npt.NDArray[np.generic]) -> None:
        """Put what `read_blocks` gave into blocks, the same or others, one for each entry of `contents`."""

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy keys and values from the first block of each pair to the second; no second one is a first one."""
        self.write_blocks([target for _, target in pairs], self.read_blocks([source for source, _ in pairs]))

    @abstractmethod
    def profile(self, plan: StepPlan) -> list[KernelTime]:
        """Run one step and say how long each kernel took, in order of execution."""


class TensorSession(Session):
    """Any model that maps arrays to arrays in one call: encoders, vision."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    @abstractmethod
    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        """The outputs, by name, for arrays as `inputs` says."""
