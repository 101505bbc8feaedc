"""Attention of encoders as one operator of ONNX Runtime, for `torch.onnx.export`: nothing here runs in torch.

Its kernel for the CPU has a fast way for scores that nothing is added to: it goes through them block by block, in the
cache, where the other way writes and reads all of them. So padding is not added to the scores. It is a feature of the
keys, which each query takes into its product: 0 where there is a token, and so far below 0 where there is none that
its share is 0. Where products give query and key they give the feature too: see `padding`. Document:
`docs/ContribOperators.md` of ONNX Runtime (MultiHeadAttention).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, eager_mask

from optkit_backends.onnxruntime.builder import MICROSOFT
from optkit_backends.onnxruntime.layers import node, trimmed

__all__ = ["FUSED"]

FUSED = "optkit_onnxruntime"
"""The name of the attention function."""

# Far below every score, and small enough for float32 to hold its product.
HIDDEN = -1e9


def _attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `query`, `key` and `value` are `[batch, heads, tokens, dim]`; the mask is `_mask`'s."""
    heads, dim = query.shape[1], query.shape[-1]
    scale = dim**-0.5 if scaling is None else float(scaling)
    shared = heads // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if attention_mask is not None and attention_mask.dim() == 2:
        padding = attention_mask[:, :, None, None].expand(-1, -1, heads, -1)
        query = torch.cat([query, torch.full_like(query[..., :1], 1 / scale)], -1)
        key = torch.cat([key, padding], -1)
        attention_mask = None
    operands = [part.flatten(2) for part in (query, key, value)]
    shape = [*operands[0].shape[:2], heads * value.shape[-1]]
    attributes = {"num_heads": heads, "scale": scale}
    mask = trimmed([None, None, attention_mask])
    output = node(f"{MICROSOFT}::MultiHeadAttention", [*operands, *mask], query.dtype, shape, attributes)
    return output.reshape(*output.shape[:2], heads, value.shape[-1]), None


def _mask(
    *args: Any,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor | None:
    """What transformers calls: `[batch, tokens]` where padding is all that hides tokens, else what scores are added to.

    Either is 0 where there is something to see. Of padding alone, what is the same for all queries, there is less.
    """
    if attention_mask is not None and mask_function is bidirectional_mask_function:
        return torch.where(attention_mask.bool(), 0.0, HIDDEN).to(dtype)
    added: Tensor | None = eager_mask(
        *args, mask_function=mask_function, attention_mask=attention_mask, dtype=dtype, **options
    )
    return added


AttentionInterface.register(FUSED, _attention)
AttentionMaskInterface.register(FUSED, _mask)
