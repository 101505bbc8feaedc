"""What a sequence computes in a step, and what the logits of its prompt say of the prompt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from optkit.engine.sampler import finite_rows, likeliest_tokens, score
from optkit.engine.sequence import Group, Sequence
from optkit.steps import Row

__all__ = ["idle_row", "row_of", "score_prompt", "wants_scores"]


def row_of(sequence: Sequence, count: int) -> Row:
    """The next `count` tokens of a sequence: known ones, then guesses. Its blocks have room for them."""
    start, tokens, group = sequence.computed, sequence.tokens, sequence.group
    end, target = start + count, sequence.target
    if count == 1 and end == target and group.forked and not wants_scores(group):
        return Row(sequence.id, (tokens[-1],), start, sequence.blocks)
    new = (*tokens[start : min(end, target)], *sequence.draft[: max(0, end - target)])
    if end > target or wants_scores(group):
        return Row(sequence.id, new, start, sequence.blocks, "all")
    # Samples that were evicted have their next token already; their prompt is only computed to be shared.
    ends = end == target and (group.forked or len(tokens) == target)
    return Row(sequence.id, new, start, sequence.blocks, "last" if ends else "none")


def idle_row(sequence: Sequence) -> Row:
    """What a rectangle computes for a sequence that has ended: its last token again, which changes no block."""
    last = sequence.computed - 1
    return Row(sequence.id, (sequence.tokens[last],), last, sequence.blocks)


def wants_scores(group: Group) -> bool:
    """Whether log probabilities of the prompt are wanted that are not known yet."""
    return group.scored and len(group.prompt_logprobs) < group.prompt_tokens - 1


def score_prompt(group: Group, row: Row, logits: npt.NDArray[np.float32]) -> bool:
    """Note the log probabilities of prompt tokens; False when the logits are not finite.

    Logits of position t judge token t + 1. What an eviction computes again is not judged twice.
    """
    prompt, start = group.request.prompt, len(group.prompt_logprobs)
    end = min(row.computed + len(row.wanted), len(prompt) - 1)
    if not all(finite_rows(logits, likeliest_tokens(logits))):
        return False
    if end > start:
        known = logits[start - row.computed : end - row.computed]
        group.prompt_logprobs += score(known, prompt[start + 1 : end + 1], group.request.params.prompt_logprobs or 0)
    return True
