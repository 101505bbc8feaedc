"""Attention as OpenVINO fuses it whole, for models of transformers while they are traced.

After the product transformers reshapes what mostly has that shape already. In a traced graph the operator stands
between attention and the transposition of its output, which then becomes a kernel of its own that copies everything.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["FUSED"]

FUSED = "optkit_openvino"
"""The name of the attention function."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `query`, `key` and `value` are `[batch, heads, tokens, dim]`."""
    groups = getattr(module, "num_key_value_groups", 1)
    causal = attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if groups > 1 or causal or position_bias is not None:
        options |= {"scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    output = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _attention)
AttentionMaskInterface.register(FUSED, sdpa_mask)
