"""What can never be served is refused when it comes, with the figures, and not left to wait."""

from __future__ import annotations

from optkit.backends import EngineCaps
from optkit.batching import blocks_at_most
from optkit.engine.request import Request
from optkit.engine.sequence import Group
from optkit.errors import RequestError
from optkit.steps import Caps

__all__ = ["check_blocks", "check_request"]

PRIORITIES = range(-100, 101)


def check_request(request: Request, caps: Caps | EngineCaps, seats: int) -> None:
    """Refuse what is wrong in itself, or longer or wider than a session can take.

    Args:
        request: as it came.
        caps: of the session.
        seats: sequences that run at once.

    Raises:
        RequestError: empty, unknown token ids, too long, too many samples, or a priority out of range.
    """
    params, prompt = request.params, len(request.prompt)
    total = prompt + params.max_tokens
    if not prompt:
        raise RequestError("the prompt is empty", remedy="give at least one token")
    if min(request.prompt) < 0 or max(request.prompt) >= caps.vocab_size:
        raise RequestError(f"the prompt holds token ids outside 0 to {caps.vocab_size - 1}")
    named = [*params.logit_bias, *params.stop_token_ids]
    if named and (min(named) < 0 or max(named) >= caps.vocab_size):
        raise RequestError(f"logit_bias or stop_token_ids hold token ids outside 0 to {caps.vocab_size - 1}")
    if total > caps.max_length:
        raise RequestError(
            f"a prompt of {prompt} tokens and {params.max_tokens} output tokens make {total}, "
            f"a sequence can have {caps.max_length}",
            remedy="shorten the prompt, lower max_tokens, or raise max_length in the recipe",
        )
    if params.samples > seats:
        raise RequestError(
            f"{params.samples} samples run at once, and the batch holds {seats} sequences",
            remedy="lower n and best_of, or raise max_batch_size in the recipe",
        )
    if request.priority not in PRIORITIES:
        raise RequestError("priority is from -100 to 100", found=request.priority)


def check_blocks(group: Group, caps: Caps) -> None:
    """Refuse what would not fit into an empty KV cache.

    Raises:
        RequestError: it needs more blocks than there are.
    """
    needed = blocks_at_most(group, caps.block_size)
    if needed > caps.blocks:
        raise RequestError(
            f"a prompt of {group.prompt_tokens} tokens and {group.samples} times {group.max_tokens} output tokens need "
            f"{needed} blocks of {caps.block_size} tokens, the KV cache has {caps.blocks}",
            remedy="lower n or max_tokens, or raise kv_cache_tokens in the recipe",
        )
