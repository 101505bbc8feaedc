"""Finds out, by running two tokens, whether a transformers model can run on paged attention and what it would keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit_backends.torch.attention import PAGED
from optkit_backends.torch.pool import LayerShape

__all__ = ["Paged", "page"]

# What attention layers pass that paged attention honours or that changes nothing here, by name.
HONOURED = frozenset(
    {
        "scaling",
        "sliding_window",
        "dropout",
        "is_causal",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
    }
)
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Angles of these depend on the longest text of a step, once one is longer than the original model's.
CHANGING_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True, slots=True)
class Paged:
    """What paged attention needs to know of a model."""

    layers: list[LayerShape]
    """What each layer keeps of a token, in order."""
    windows: list[int | None]
    """Of each layer: how many of the last tokens it sees; None for all."""
    longest: int | None
    """Tokens beyond which rotary angles change with the other texts of a step; None where they never do."""

    def check(self, max_length: int, where: Path) -> None:
        """Check that sequences of `max_length` tokens do not depend on others, in the model at `where`.

        Raises:
            RecipeError: they would.
        """
        if self.longest is not None and max_length > self.longest:
            raise RecipeError(
                f"rotary angles would change with the other texts of a step beyond {self.longest} tokens, which this"
                " backend does not allow",
                where=str(where),
                found=max_length,
                remedy=f"set max_length to {self.longest} or less",
            )


def page(module: Any, where: str) -> Paged:
    """Switch a causal language model to paged attention.

    Args:
        module: a transformers module, changed in place.
        where: it comes from, for errors.

    Raises:
        RecipeError: the model does more than paged attention can, or keeps other state between steps.
    """
    config = module.config
    module.set_attn_implementation(PAGED)
    probe = _Probe()
    try:
        with torch.inference_mode():
            logits = module(
                input_ids=torch.zeros(1, 2, dtype=torch.long),
                position_ids=torch.arange(2)[None],
                use_cache=False,
                logits_to_keep=torch.tensor([1]),
                paged=probe,
            ).logits
    except TypeError as error:  # some class on the way takes no such argument
        raise _refused(where, f"does not pass its options on to attention ({error})") from error
    count = config.num_hidden_layers
    if sorted(probe.layers) != list(range(count)):
        found = len(probe.layers)
        raise _refused(where, f"has {count} layers of which {found} use transformers' attention interface")
    if probe.unknown:
        raise _refused(where, f"needs attention with {', '.join(sorted(probe.unknown))}")
    if logits.shape[1] != 1:
        raise _refused(where, "cannot leave out logits")
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in LAYER_TYPES or (kind == "sliding_attention" and probe.windows[layer] is None):
            raise _refused(where, f"needs attention of the type {kind}")
    rope = getattr(config, "rope_parameters", None) or {}
    known = [
        entry.get("original_max_position_embeddings") or config.max_position_embeddings
        for entry in (rope, *(value for value in rope.values() if isinstance(value, dict)))
        if entry.get("rope_type") in CHANGING_ROPE
    ]
    order = range(count)
    layers, windows = [probe.layers[layer] for layer in order], [probe.windows[layer] for layer in order]
    return Paged(layers, windows, min(known, default=None))


class _Probe:
    """Notes what layers ask of attention, and answers zeros."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.windows: dict[int, int | None] = {}
        self.unknown: set[str] = set()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        layer: Any = module.layer_idx
        scheme = getattr(module, "cache_scheme", None)
        dtype = torch.float32 if scheme is None else scheme.dtype
        self.layers[layer] = LayerShape(len(key), key.shape[-1], value.shape[-1], dtype)
        self.windows[layer] = options.get("sliding_window")
        self.unknown |= {name for name, given in options.items() if name not in HONOURED and given is not None}
        if options.get("is_causal") is False or not getattr(module, "is_causal", True):
            self.unknown.add("is_causal=False")
        return value.new_zeros(query.shape[1], len(query), value.shape[-1])


def _refused(where: str, reason: str) -> RecipeError:
    return RecipeError(
        f"this backend runs causal attention with or without a window, and this model {reason}",
        where=where,
        remedy="choose another backend",
    )
