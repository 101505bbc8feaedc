"""Training one model to answer as another, on calibration data: distances, held-out samples, and steps that resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from optkit.blockwise import output_of
from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError, RecipeError

__all__ = [
    "Lesson",
    "Training",
    "distance_of",
    "divergence",
    "held_out",
    "joined",
    "relative_error",
    "schedule",
    "size_of",
]

Batch = Mapping[str, Tensor]
Distance = Callable[[Tensor, Tensor, float], Tensor]
"""`distance(ours, wanted, temperature)`: the mean over positions, a scalar."""

_KEEP_EVERY = 25
_STATE = ("exp_avg", "exp_avg_sq", "step")
_MOMENTS = (0.9, 0.95)
_LONGEST_GRADIENT = 1.0


def divergence(ours: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """The KL divergence of our distribution from the wanted one in nats, times the temperature squared.

    So multiplied, its gradient stays as large at any temperature (Hinton et al., arXiv:1503.02531, section 2.1).

    Args:
        ours: logits `[..., classes]`.
        wanted: logits `[..., classes]`.
        temperature: divides both.
    """
    own = functional.log_softmax(ours.flatten(0, -2) / temperature, -1)
    goal = functional.log_softmax(wanted.flatten(0, -2) / temperature, -1)
    return functional.kl_div(own, goal, log_target=True, reduction="batchmean") * temperature**2


def relative_error(ours: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """The squared distance of each hidden state `[..., features]` in proportion to the wanted one's squared length."""
    del temperature  # of distributions only
    return ((ours - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def distance_of(tags: Collection[str]) -> Distance:
    """What answering alike means for a model: hidden states for an encoder, else distributions over the last axis."""
    return relative_error if "task:feature-extraction" in tags else divergence


def held_out(batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
    """Batches to learn from, and those to judge by: that share of them, at least one, at even distances.

    Raises:
        RecipeError: there are not two.
    """
    if len(batches) < 2:
        what = "one calibration sample is too few, to learn from and to judge by"
        raise RecipeError(what, found=len(batches), remedy="raise calibration.samples")
    count = max(1, round(share * len(batches)))
    judging = {(2 * place + 1) * len(batches) // (2 * count) for place in range(count)}
    learnt = [batch for place, batch in enumerate(batches) if place not in judging]
    return learnt, [batches[place] for place in sorted(judging)]


def schedule(sizes: Sequence[int], steps: int, least: int, seed: int) -> list[list[int]]:
    """The samples of each step: in random order, all of them before one comes again, until they have the least size."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    plan: list[list[int]] = []
    for _ in range(steps):
        taken: list[int] = []
        while sum(sizes[place] for place in taken) < least:
            left = left or torch.randperm(len(sizes), generator=generator).tolist()
            taken.append(left.pop())
        plan.append(taken)
    return plan


def size_of(batch: Batch) -> int:
    """Tokens of a text, rows of anything else."""
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))


def joined(batches: Iterable[Batch], most: int) -> list[Batch]:
    """Batches of one shape as one, up to a size: fewer and larger products of matrices.

    Args:
        batches: each `[rows, ...]`.
        most: what is larger by itself stays as it is.
    """
    alike: dict[Any, list[list[Batch]]] = {}
    for batch in batches:
        shape = tuple((name, value.dtype, value.shape[1:]) for name, value in sorted(batch.items()))
        groups = alike.setdefault(shape, [])
        if groups and sum(map(size_of, groups[-1])) + size_of(batch) <= most:
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return [
        {name: torch.cat([batch[name] for batch in group]) for name in group[0]}
        for groups in alike.values()
        for group in groups
    ]


class Lesson:
    """A model, and the one that it learns from, on one device.

    Args:
        student: the model.
        teacher: is run without gradients.
        distance: of their outputs.
        device: where both are.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, distance: Distance, device: str) -> None:
        self._student, self._teacher, self._distance, self._device = student, teacher, distance, device

    def between(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """The mean distance on a batch, with gradients for the student.

        Raises:
            OptkitError: the outputs have other shapes.
        """
        moved = {name: value.to(self._device) for name, value in batch.items()}
        with torch.no_grad():
            wanted = output_of(self._teacher, moved)
        ours = output_of(self._student, moved)
        if ours.shape != wanted.shape:
            what = f"gives {tuple(ours.shape)} where the original model gives {tuple(wanted.shape)}"
            raise OptkitError(
                f"{what}, so that it cannot learn from it", where="the model", remedy="leave recovery out"
            )
        return self._distance(ours, wanted, temperature)

    @torch.no_grad()
    def judge(self, batches: Sequence[Batch], told: Callable[[], None]) -> float:
        """The mean distance over the tokens, or rows, of batches; `told()` before each."""
        total = 0.0
        for batch in batches:
            told()
            total += float(self.between(batch)) * size_of(batch)
        return total / sum(size_of(batch) for batch in batches)


class Training:
    """Adam on named parameters, with a warm-up and a cosine, that goes on from a checkpoint.

    Args:
        trained: the parameters.
        steps: in all.
        learning_rate: the highest.
        checkpoint: where every 25th step is kept.
        masked: parameters of more than one axis keep their zeros.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        steps: int,
        learning_rate: float,
        checkpoint: Checkpoint,
        *,
        masked: bool = False,
    ) -> None:
        self._trained, self._steps, self._peak, self._checkpoint = trained, steps, learning_rate, checkpoint
        matrices = {name: parameter for name, parameter in trained.items() if parameter.dim() > 1 and masked}
        self._masks = {name: parameter.detach() != 0 for name, parameter in matrices.items()}
        self._optimizer = torch.optim.Adam(trained.values(), lr=learning_rate, betas=_MOMENTS)

    def step(self, index: int) -> None:
        """Update the parameters by their gradients, and forget these.

        Raises:
            OptkitError: a gradient is not finite.
        """
        for name, mask in self._masks.items():
            gradient = self._trained[name].grad
            if gradient is not None:
                gradient.mul_(mask)  # Adam does not move what never had a gradient
        length = nn.utils.clip_grad_norm_(self._trained.values(), _LONGEST_GRADIENT)
        if not torch.isfinite(length):
            what, where = "a gradient is NaN or infinite", f"step {index + 1} of {self._steps}"
            raise OptkitError(what, where=where, remedy=f"lower learning_rate, here {self._peak:g}, or check the model")
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(index)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _rate(self, index: int) -> float:
        warm = max(1, self._steps // 10)
        cooled = 0.5 * (1 + math.cos(math.pi * max(0, index + 1 - warm) / (self._steps + 1 - warm)))
        return self._peak * min(1.0, (index + 1) / warm) * cooled

    def keep(self, index: int) -> None:
        """Keep the state after step `index` in the checkpoint, if it is one of those that are kept."""
        done = index + 1
        if done % _KEEP_EVERY:
            return
        # In turns, and one kind of tensor after another: the last whole state stays until the next one is whole, and no
        # more than a third of it is copied at once.
        slot = done // _KEEP_EVERY % 2
        self._checkpoint.save(f"weights-{slot}", self._trained)
        # What never had a gradient has no state.
        states = {name: self._optimizer.state.get(parameter) for name, parameter in self._trained.items()}
        for kind in _STATE:
            self._checkpoint.save(f"{kind}-{slot}", {name: state[kind] for name, state in states.items() if state})
        self._checkpoint.save("progress", {}, {"done": done, "slot": slot})

    def resumed(self) -> int:
        """Put the checkpoint's last state back, if it has one: the number of steps that are done."""
        found = self._checkpoint.load("progress")
        if found is None:
            return 0
        slot = found[1]["slot"]
        for name, tensor in self._kept(f"weights-{slot}").items():
            self._trained[name].data.copy_(tensor)
        kinds = {kind: self._kept(f"{kind}-{slot}") for kind in _STATE}
        for name in kinds["step"]:
            parameter = self._trained[name]
            moments = {kind: kinds[kind][name].to(parameter.device) for kind in _STATE[:2]}
            self._optimizer.state[parameter] = {**moments, "step": kinds["step"][name]}
        done: int = found[1]["done"]
        return done

    def _kept(self, name: str) -> dict[str, Tensor]:
        found = self._checkpoint.load(name)
        assert found is not None  # it was whole before "progress" named it
        return found[0]
