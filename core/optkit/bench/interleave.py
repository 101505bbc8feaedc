"""Arms that run by turns in one session: randomized ABBA blocks, the raw material of every comparison."""

from __future__ import annotations

import gc
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from optkit.errors import RecipeError
from optkit.metrics import Run

__all__ = ["Arm", "Progress", "Sample", "Samples", "Workload", "measure"]

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`."""


class Arm(ABC):
    """One way to run a model, under a name. Runs are independent: nothing of one may speed up the next."""

    name: str

    @abstractmethod
    def run(self, prompt: tuple[int, ...], output_tokens: int) -> Run:
        """Generate exactly `output_tokens` tokens greedily after `prompt`, whatever the end-of-text token says."""

    @abstractmethod
    def close(self) -> None:
        """Give back memory. Closing twice does nothing."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What every arm does in every block, twice."""

    prompt_tokens: int
    output_tokens: int
    blocks: int
    seed: int = 0
    """Of the order within the blocks."""

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.output_tokens, self.blocks) < 1:
            raise ValueError("prompt_tokens, output_tokens and blocks are at least 1")


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run and its place in the session."""

    block: int
    position: int
    """Within the block, from 0."""
    arm: str
    run: Run


@dataclass(frozen=True, slots=True)
class Samples:
    """Every run of a session, raw, in the order in which they ran."""

    workload: Workload
    arms: tuple[str, ...]
    """Names, the A/A arm's second self included."""
    again: tuple[str, str] | None
    """The arm that ran twice over and the name of its second self, for the noise floor."""
    samples: tuple[Sample, ...]

    def of(self, arm: str) -> list[Sample]:
        """The runs of one arm."""
        return [sample for sample in self.samples if sample.arm == arm]

    def to_jsonl(self) -> str:
        """One line of JSON on the session, then one for each run."""
        head = {"workload": asdict(self.workload), "arms": self.arms, "again": self.again}
        return "".join(json.dumps(line) + "\n" for line in [head, *(asdict(sample) for sample in self.samples)])


def measure(
    arms: Sequence[Arm],
    prompts: Sequence[tuple[int, ...]],
    workload: Workload,
    progress: Progress,
    *,
    again: str | None = None,
) -> Samples:
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
        entrants, twin = _entrants(arms, again)
        total = len(arms) + workload.blocks * 2 * len(entrants)
        samples: list[Sample] = []
        for done, arm in enumerate(arms):
            progress(done, total, f"warm up {arm.name}")
            arm.run(cut[-1], workload.output_tokens)
        stack.enter_context(_own_garbage_only())
        random = np.random.default_rng(workload.seed)
        for block in range(workload.blocks):
            order = random.permutation(len(entrants)).tolist()
            for position, index in enumerate(order + order[::-1]):
                label, arm = entrants[index]
                progress(len(arms) + len(samples), total, f"block {block + 1} of {workload.blocks}: {label}")
                prompt = cut[(2 * block + position // len(entrants)) % len(cut)]
                gc.collect()
                samples.append(Sample(block, position, label, arm.run(prompt, workload.output_tokens)))
        progress(total, total, "benchmark")
    return Samples(workload, tuple(label for label, _ in entrants), twin, tuple(samples))


def _entrants(arms: Sequence[Arm], again: str | None) -> tuple[list[tuple[str, Arm]], tuple[str, str] | None]:
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
