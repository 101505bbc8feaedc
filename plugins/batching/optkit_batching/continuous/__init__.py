"""Continuous batching: requests join and leave the batch at every step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from optkit.batching import Batcher, MemoryView, RequestView, Schedule, Wait
from optkit_batching.continuous.admission import POLICIES
from optkit_batching.continuous.order import ORDERS
from optkit_batching.continuous.step import Step

__all__ = ["Continuous"]


class Continuous(Batcher):
    """Lets requests join and leave the batch at every step, so that a short one never waits for a long one to end.

    A step computes one token of every sequence that has its prompt behind it, and spends what is left of its budget on
    prompts, in chunks (Sarathi-Serve, arXiv:2403.02310; Orca, OSDI 2022; PagedAttention, arXiv:2309.06180). When blocks
    run out, the request that stands last is evicted whole, all blocks of all its samples, and comes back later to the
    very same output. With `reserve_full` this never happens.
    """

    max_batch_size: int = Field(default=16, ge=1, le=4096)
    """Sequences in the batch at most; every sample of a request is one."""
    max_step_tokens: int | None = Field(default=None, ge=1)
    """Tokens that one step computes at most; by default 256 for prompts, beside one for every sequence. Fewer make
    running answers flow evenly while prompts are computed beside them; more get prompts done sooner, where the
    processor has cores to spare."""
    order: Literal["fcfs", "priority", "shortest_prompt"] = "fcfs"
    """Who is next: first come first served, lowest priority number, or shortest prompt; see `patience_s`."""
    patience_s: float = Field(default=60.0, gt=0)
    """What keeps everybody from starving: so many seconds of waiting outweigh one level of priority, or 1,000 tokens of
    prompt. `fcfs` needs none."""
    admission: Literal["reserve_full", "reserve_prompt", "watermark", "none"] = "reserve_full"
    """When a request may begin: when blocks for all the output that it may have are sure (nobody is ever evicted); for
    its prompt; for its prompt with the share `watermark` of all blocks left over; or for the next step alone."""
    watermark: float = Field(default=0.01, ge=0, lt=1)
    """Share of the blocks that the admission `watermark` leaves free."""
    preemption: Literal["recompute", "swap"] = "recompute"
    """How an evicted request comes back: its KV is computed again, or was copied to host memory and is copied back."""
    prefix_cache: bool = True
    """Whether requests take over the computed blocks of others, ended ones too, that began with the same tokens. Of no
    use to a session with slots."""

    @model_validator(mode="after")
    def _budget(self) -> Continuous:
        if self.max_step_tokens is not None and self.max_step_tokens < self.max_batch_size:
            raise ValueError(
                f"a step must hold a token of each of {self.max_batch_size} sequences; "
                f"raise max_step_tokens from {self.max_step_tokens}"
            )
        return self

    @property
    def max_sequences(self) -> int:
        return self.max_batch_size

    @property
    def shares_prefixes(self) -> bool:
        return self.prefix_cache

    def queue_key(self, request: RequestView) -> tuple[float, ...]:
        return (ORDERS[self.order](request, self.patience_s),)

    def plan(
        self, waiting: Collection[RequestView], running: Collection[RequestView], memory: MemoryView, now: float
    ) -> Schedule | Wait:
        seats = min(self.max_batch_size, memory.caps.max_batch_size)
        step = Step(
            running,
            memory,
            budget=self.max_step_tokens or self.max_batch_size + 256,
            seats=seats,
            preemption=self.preemption,
        )
        if memory.caps.mixed:
            step.decode()
        step.go_on_with_prompts()
        step.admit(waiting, POLICIES[self.admission](self.watermark))
        if not memory.caps.mixed and step.idle:  # prompts come first, and answers go on when none can
            step.decode()
        return Wait(None) if step.empty else step.schedule()
