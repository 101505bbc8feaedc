"""What the kernels noted of one step's time, in the words of `optkit.steps.KernelTime`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from optkit.steps import KernelTime, StepPlan
from optkit_backends.torch.native.layout import Instructions, Linear, Model

__all__ = ["kernel_times", "room"]

# As `csrc/shapes.h` orders them.
_STORED = ("float32", "int8", "int4", "int8", "int4")
_BYTES = (4.0, 1.0, 0.5, 1.0, 0.5)
# Phases of a layer as `csrc/shapes.h` orders them: its path, what runs, and the products in it.
_PHASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("input_layernorm", "norm and rounding", ()),
    ("self_attn.q_proj, k_proj, v_proj", "", ("query", "key", "value")),
    ("self_attn", "rotary angles and KV write", ()),
    ("self_attn", "paged attention", ()),
    ("self_attn", "rounding", ()),
    ("self_attn.o_proj", "", ("out",)),
    ("post_attention_layernorm", "residual, norm and rounding", ()),
    ("mlp.gate_proj, up_proj", "", ("gate", "up")),
    ("mlp", "gate and rounding", ()),
    ("mlp.down_proj", "", ("down",)),
)


def room(model: Model) -> Any:
    """Where a step of this model notes its times."""
    return (ctypes.c_double * (model.layer_count * len(_PHASES) + 2))()


def kernel_times(
    model: Model, instructions: Instructions, seconds: Sequence[float], plan: StepPlan
) -> list[KernelTime]:
    """The times of one step, in order of execution."""
    times = [KernelTime("model.embed_tokens", "native embedding", seconds[0])]
    wanted = sum(len(row.wanted) for row in plan.rows)
    for index in range(model.layer_count):
        layer, last = model.layers[index], index == model.layer_count - 1
        for phase, (path, kernel, names) in enumerate(_PHASES):
            taken = seconds[1 + index * len(_PHASES) + phase]
            place = f"model.layers.{index}.{path}"
            if names:
                # Behind the cache, the last layer is for rows of logits alone.
                rows = wanted if last and "query" not in names else plan.tokens
                times.append(_product(place, [getattr(layer, name) for name in names], taken, rows, instructions))
            elif kernel != "rounding" or layer.out.rounding:
                times.append(KernelTime(place, f"native {kernel}", taken))
    times.append(_product("lm_head", [model.head], seconds[-1], wanted, instructions))
    return times


def _product(path: str, linears: Sequence[Linear], seconds: float, rows: int, instructions: Instructions) -> KernelTime:
    weights = [getattr(linear, "in") * linear.out for linear in linears]
    kinds = dict.fromkeys(f"{_STORED[one.storage]} weights{', int8 input' if one.rounding else ''}" for one in linears)
    stored = sum(count * _BYTES[one.storage] for count, one in zip(weights, linears, strict=True)) if rows else 0
    kernel = f"native product ({' and '.join(kinds)}; {instructions.title})"
    integer = all(one.rounding for one in linears)
    return KernelTime(path, kernel, seconds, int(stored), 2 * rows * sum(weights), integer)
