"""Arms that run by turns in one session: randomized ABBA blocks, the raw material of every comparison."""

from __future__ import annotations

import gc
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from optkit.errors import RecipeError
from optkit.metrics import EncodingRun, ImageRun, Run

__all__ = [
    "Arm",
    "EncodingArm",
    "EncodingWorkload",
    "GenerationArm",
    "ImageArm",
    "ImageWorkload",
    "PassArm",
    "Progress",
    "Sample",
    "Samples",
    "Work",
    "Workload",
    "measure",
    "measure_passes",
]

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`."""
A = TypeVar("A", bound="Arm")
R = TypeVar("R")
D = TypeVar("D")
R_contra = TypeVar("R_contra", contravariant=True)


class Arm(ABC):
    """One way to run a model, under a name. Runs are independent: nothing of one may speed up the next."""

    name: str

    @abstractmethod
    def answer(self, request: Mapping[str, Any]) -> None:
        """Do the one piece of work that memory is measured with.

        Args:
            request: as the task of the arm says it, in JSON; see `optkit.measure.Task.request`.
        """

    @abstractmethod
    def close(self) -> None:
        """Give back memory. Closing twice does nothing."""


class GenerationArm(Arm):
    """One way to run a causal language model."""

    @abstractmethod
    def run(self, prompt: tuple[int, ...], output_tokens: int) -> Run:
        """Generate exactly `output_tokens` tokens greedily after `prompt`, whatever the end-of-text token says."""

    def answer(self, request: Mapping[str, Any]) -> None:
        self.run(tuple(request["prompt"]), request["output_tokens"])


class PassArm(Arm, Generic[D, R]):
    """One way to run a model that answers in one call."""

    @abstractmethod
    def run(self, data: D) -> R:
        """One pass over all data, handed over at once."""


class EncodingArm(PassArm[Sequence[tuple[int, ...]], EncodingRun]):
    """One way to run an encoder: a pass embeds sequences of token ids."""

    def answer(self, request: Mapping[str, Any]) -> None:
        self.run([tuple(request["sequence"])])


class ImageArm(PassArm[npt.NDArray[np.float32], ImageRun]):
    """One way to run an image classifier: a pass classifies prepared images `[images, channels, height, width]`."""

    def answer(self, request: Mapping[str, Any]) -> None:
        # What is on an image changes nothing of the memory.
        self.run(np.zeros((1, *request["pixels"]), np.float32))


class Work(Protocol[R_contra]):
    """What every arm does in every block, twice."""

    @property
    def blocks(self) -> int: ...

    @property
    def seed(self) -> int:
        """Of the order within the blocks."""
        ...

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def differs(self, run: R_contra) -> str | None:
        """In what a run was not this work, or None."""
        ...

    def degenerate(self, runs: Sequence[R_contra]) -> str | None:
        """In what the outputs of an arm are worth nothing, so that its speed is not either; or None."""
        ...


@dataclass(frozen=True, slots=True)
class Workload:
    """What every arm of a causal language model does in every block, twice."""

    prompt_tokens: int
    output_tokens: int
    blocks: int
    seed: int = 0
    """Of the order within the blocks."""

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.output_tokens, self.blocks) < 1:
            raise ValueError("prompt_tokens, output_tokens and blocks are at least 1")

    def differs(self, run: Run) -> str | None:
        if run.prompt_tokens != self.prompt_tokens:
            return f"{run.prompt_tokens} prompt tokens instead of {self.prompt_tokens}"
        if not len(run.output) == len(run.token_seconds) == self.output_tokens:
            return f"{len(run.output)} output tokens instead of {self.output_tokens}, {len(run.token_seconds)} timed"
        times = np.array(run.token_seconds)
        # Several tokens may share a moment; what no clock gives is NaN, nothing, or time that runs backwards.
        if not np.isfinite(times).all() or times[0] <= 0 or (np.diff(times) < 0).any():
            return "the times of its tokens are not in order"
        return None

    def degenerate(self, runs: Sequence[Run]) -> str | None:
        monotonous = all(len(set(run.output)) == 1 for run in runs)
        return "repeats one token over and over" if monotonous else None


@dataclass(frozen=True, slots=True)
class EncodingWorkload:
    """What every arm of an encoder does in every block, twice."""

    sequences: int
    tokens: int
    """Of all sequences."""
    blocks: int
    seed: int = 0
    """Of the order within the blocks."""

    def differs(self, run: EncodingRun) -> str | None:
        if (run.sequences, run.tokens) != (self.sequences, self.tokens):
            return f"{run.sequences} sequences of {run.tokens} tokens instead of {self.sequences} of {self.tokens}"
        return None if np.isfinite(run.seconds) and run.seconds > 0 else "it took no time"

    def degenerate(self, runs: Sequence[EncodingRun]) -> str | None:
        return None  # an arm refuses embeddings that are not finite, and quality judges the others


@dataclass(frozen=True, slots=True)
class ImageWorkload:
    """What every arm of an image classifier does in every block, twice."""

    images: int
    blocks: int
    seed: int = 0
    """Of the order within the blocks."""

    def differs(self, run: ImageRun) -> str | None:
        if run.images != self.images:
            return f"{run.images} images instead of {self.images}"
        return None if np.isfinite(run.seconds) and run.seconds > 0 else "it took no time"

    def degenerate(self, runs: Sequence[ImageRun]) -> str | None:
        return None  # an arm refuses logits that are not finite, and quality judges the others


@dataclass(frozen=True, slots=True)
class Sample(Generic[R]):
    """One timed run and its place in the session."""

    block: int
    position: int
    """Within the block, from 0."""
    arm: str
    run: R


@dataclass(frozen=True, slots=True)
class Samples(Generic[R]):
    """Every run of a session, raw, in the order in which they ran."""

    workload: Work[R]
    arms: tuple[str, ...]
    """Names, the A/A arm's second self included."""
    again: tuple[str, str] | None
    """The arm that ran twice over and the name of its second self, for the noise floor."""
    samples: tuple[Sample[R], ...]

    def of(self, arm: str) -> list[Sample[R]]:
        """The runs of one arm."""
        return [sample for sample in self.samples if sample.arm == arm]

    def to_jsonl(self) -> str:
        """One line of JSON on the session, then one for each run."""
        head = {"workload": asdict(self.workload), "arms": self.arms, "again": self.again}
        return "".join(json.dumps(line) + "\n" for line in [head, *(asdict(sample) for sample in self.samples)])


def measure(
    arms: Sequence[GenerationArm],
    prompts: Sequence[tuple[int, ...]],
    workload: Workload,
    progress: Progress,
    *,
    again: str | None = None,
) -> Samples[Run]:
    """Run all arms by turns and close them at the end, however it ends.

    Within a block every arm runs once in a random order and once in the mirrored order (A B B A), so that a machine
    that slows down steadily slows all of them alike. All arms get the same prompt, and each half of each block the next
    one of `prompts`, which start over at their end. Before the first block every arm runs once untimed.

    Args:
        arms: what to compare, each under another name.
        prompts: token ids, at least one; each is cut to the workload's length.
        workload: how much of it.
        progress: called before each run.
        again: name of the arm that takes part twice over (A/A).

    Raises:
        RecipeError: a prompt is too short.
        ValueError: two arms have one name, or `again` is none of them.
    """
    with ExitStack() as stack:
        for arm in arms:
            stack.callback(arm.close)
        cut = [_cut(prompt, workload) for prompt in prompts]

        def run(arm: GenerationArm, half: int) -> Run:
            return arm.run(cut[half % len(cut)], workload.output_tokens)

        return _by_turns(arms, workload, run, progress, again)


def measure_passes(
    arms: Sequence[PassArm[D, R]], data: D, workload: Work[R], progress: Progress, *, again: str | None = None
) -> Samples[R]:
    """The same for models of one call: in each half of each block every arm passes over all data; see `measure`."""
    with ExitStack() as stack:
        for arm in arms:
            stack.callback(arm.close)
        return _by_turns(arms, workload, lambda arm, _: arm.run(data), progress, again)


def _by_turns(
    arms: Sequence[A], work: Work[R], run: Callable[[A, int], R], progress: Progress, again: str | None
) -> Samples[R]:
    """The blocks. `run` gets an arm and the number of the half block, -1 for the warm-up."""
    entrants, twin = _entrants(arms, again)
    total = len(arms) + work.blocks * 2 * len(entrants)
    samples: list[Sample[R]] = []
    for done, arm in enumerate(arms):
        progress(done, total, f"warm up {arm.name}")
        run(arm, -1)
    with _own_garbage_only():
        random = np.random.default_rng(work.seed)
        for block in range(work.blocks):
            order = random.permutation(len(entrants)).tolist()
            for position, index in enumerate(order + order[::-1]):
                label, arm = entrants[index]
                progress(len(arms) + len(samples), total, f"block {block + 1} of {work.blocks}: {label}")
                gc.collect()
                samples.append(Sample(block, position, label, run(arm, 2 * block + position // len(entrants))))
        progress(total, total, "benchmark")
    return Samples(work, tuple(label for label, _ in entrants), twin, tuple(samples))


def _entrants(arms: Sequence[A], again: str | None) -> tuple[list[tuple[str, A]], tuple[str, str] | None]:
    entrants = {arm.name: arm for arm in arms}
    if len(entrants) != len(arms) or not (again is None or again in entrants):
        raise ValueError(f"arms {[arm.name for arm in arms]} must differ in name, and {again!r} must be one of them")
    if again is None:
        return list(entrants.items()), None
    twin = f"{again} (again)"
    return [*entrants.items(), (twin, entrants[again])], (again, twin)


def _cut(prompt: tuple[int, ...], workload: Workload) -> tuple[int, ...]:
    if len(prompt) < workload.prompt_tokens:
        raise RecipeError(
            f"a prompt has {len(prompt)} tokens",
            found=workload.prompt_tokens,
            remedy="lower the benchmark's prompt_tokens or give longer prompts",
        )
    return prompt[: workload.prompt_tokens]


@contextmanager
def _own_garbage_only() -> Iterator[None]:
    """Let a run pay for collecting its own garbage, as it would alone in its process, and not for anybody else's.

    A full collection walks every object of every arm, and falls on whichever arm happens to allocate. So what is there
    before the first run is left out of collections, and what a run leaves behind is collected before the next one.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
