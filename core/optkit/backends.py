"""Runtimes: what compiles a model, and the sessions that run it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from optkit.model import Model, ModelCard
from optkit.options import Options
from optkit.steps import Caps, KernelTime, Limits, StepPlan, StepResult, TensorSpec

__all__ = [
    "AnySession",
    "Backend",
    "EngineCaps",
    "EngineRequest",
    "EngineSession",
    "Lowering",
    "Sampling",
    "Session",
    "TensorSession",
    "TokenSession",
]


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
        """What is missing on this machine to compile and to open, and how to get it, or None. Imports nothing heavy."""

    def uncompilable(self) -> str | None:
        """What is missing on this machine to compile and how to get it, or None: what `open` can do without. Imports
        nothing heavy."""
        return None

    @abstractmethod
    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        """For each `weights:*`, `activations:*` and `kv:*` tag the kernel that will run it or why none can.

        From the tags alone. A format that it does not mention cannot run.
        A missing architecture or task stands under its own tag, for example `arch:mamba`.
        """

    @property
    def own_batch_size(self) -> int | None:
        """Sequences that the runtime keeps alive at once, where it batches by itself and `open` gives an
        `EngineSession`. None: the recipe's batching strategy decides."""
        return None

    def runtime_bytes(self, card: ModelCard, weight_bytes: int) -> int:
        """Estimated peak memory of `compile` and `open` together, above the loaded model, in bytes."""
        return weight_bytes

    @abstractmethod
    def compile(self, model: Model, directory: Path) -> None:
        """Write what `open` needs into the empty `directory`. No pickle."""

    @abstractmethod
    def open(self, runtime: Path, weights: Path, limits: Limits) -> AnySession:
        """A session over what `compile` wrote into `runtime`, beside the artifact's `weights` folder.

        Raises:
            DamagedError: the files cannot be what `compile` wrote.
            MachineError: not enough memory for `limits`.
        """


class Session(ABC):
    """A compiled model, ready to run. Used as a context manager, or closed.

    Not thread-safe, but for what `TensorSession.streams` says.
    """

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
    streams: int = 1
    """Calls of `run` that threads may make at the same time, and that share the cores among them."""

    @abstractmethod
    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        """The outputs, by name, for arrays as `inputs` says."""

    def profile(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> list[KernelTime]:
        """Run twice and say how long each kernel took the second time, in order of execution.

        Where a runtime does not tell, the whole call is one kernel.
        """
        self.run(inputs)
        begin = time.perf_counter()
        self.run(inputs)
        return [KernelTime("the whole model", type(self).__name__, time.perf_counter() - begin)]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine chooses tokens, in the words and with the defaults of `optkit.engine.SamplingParams`."""

    temperature: float = 0.0
    min_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """Token ids to continue, once: several samples are several requests."""

    prompt: tuple[int, ...]
    """At least one token."""
    max_tokens: int
    """Output tokens at most; with the prompt no more than `EngineCaps.max_length`."""
    stop_tokens: frozenset[int]
    """The first of these is the last token of the output."""
    sampling: Sampling
    """What is not in `EngineCaps.sampling` has its default."""


@dataclass(frozen=True, slots=True)
class EngineCaps:
    """What an engine can do. Requests beyond it are refused before they reach it."""

    vocab_size: int
    max_length: int
    """Tokens of one sequence, prompt and output together. One of that length always fits into its KV cache."""
    max_batch_size: int
    """Sequences that run at once; more wait in it."""
    sampling: frozenset[str]
    """The fields of `Sampling` that it honours as optkit defines them. Every engine decodes greedily."""


class EngineSession(Session):
    """A causal language model in a runtime that batches by itself.

    `submit` may be called in any event loop, by many tasks at once. Its sequences do not depend on each other, and
    share no cached prefixes: a request's time would tell what others asked before it.
    """

    caps: EngineCaps

    @abstractmethod
    def submit(self, request: EngineRequest) -> AsyncGenerator[int, None]:
        """The output of one request, token by token as they come; it ends after a stop token or `max_tokens`.

        Work begins when the stream is first asked. Closing the stream (`aclose`, or cancelling the task that waits for
        it) ends the request within one step of the engine. `close` ends every stream that is open.

        Raises:
            MachineError: by every stream, when the engine has failed as a whole or is closed. Anything else that a
                stream raises concerns its request alone.
        """

    @abstractmethod
    def scores(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of a whole text by the compiled model, `[len(tokens), vocabulary]`: position t predicts token t + 1.

        What quality and parity are judged by. Not while streams are open.
        """


AnySession: TypeAlias = TokenSession | TensorSession | EngineSession
"""What a backend opens."""
