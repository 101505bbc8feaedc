"""Cuts models by hand, for tests of what runs models whose layers differ in shape, and looks at what pruners cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from optkit.errors import RecipeError
from optkit.quantized import replace_module
from optkit.shapes import LowRankLinear


def cut(layer: nn.Linear, *, inputs: int | None = None, outputs: int | None = None) -> None:
    """The first so many inputs and outputs of a linear layer."""
    layer.weight = nn.Parameter(layer.weight[:outputs, :inputs].clone(), requires_grad=False)
    layer.out_features, layer.in_features = layer.weight.shape
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[:outputs].clone(), requires_grad=False)


def narrow(mlp: Any, width: int) -> None:
    """A gated MLP with its first so many channels."""
    for layer in (mlp.gate_proj, mlp.up_proj):
        cut(layer, outputs=width)
    cut(mlp.down_proj, inputs=width)
    mlp.intermediate_size = width


def behead(attention: Any, queries: int, keys: int) -> None:
    """An attention with its first so many heads of queries, and of keys and values."""
    size = attention.head_dim
    for layer, heads in ((attention.q_proj, queries), (attention.k_proj, keys), (attention.v_proj, keys)):
        cut(layer, outputs=heads * size)
    cut(attention.o_proj, inputs=queries * size)
    attention.num_key_value_groups = queries // keys


def factored(module: nn.Module, path: str, rank: int) -> None:
    """Put the best layer of a rank in the place of a linear one."""
    layer: Any = module.get_submodule(path)
    left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
    first = nn.Linear(layer.in_features, rank, bias=False)
    second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
    first.weight = nn.Parameter(right[:rank].clone(), requires_grad=False)
    second.weight = nn.Parameter((left * values)[:, :rank].clone(), requires_grad=False)
    second.bias = layer.bias
    replace_module(module, path, LowRankLinear(first, second))


def encoder_block(block: Any, width: int, heads: int) -> None:
    """A layer of a BERT with its first so many FFN channels and heads."""
    cut(block.intermediate.dense, outputs=width)
    cut(block.output.dense, inputs=width)
    attention = block.attention.self
    size = attention.attention_head_size
    for layer in (attention.query, attention.key, attention.value):
        cut(layer, outputs=heads * size)
    cut(block.attention.output.dense, inputs=heads * size)
    attention.num_attention_heads, attention.all_head_size = heads, heads * size


def places(part: torch.Tensor, whole: torch.Tensor, axis: int) -> list[int]:
    """Which rows or columns of a matrix a part of it is."""
    rows = {tuple(row.tolist()): place for place, row in enumerate(whole.movedim(axis, 0))}
    return [rows[tuple(row.tolist())] for row in part.movedim(axis, 0)]


def refusal(work: Callable[[], object]) -> str | None:
    """What a recipe error says, if there is one."""
    try:
        work()
    except RecipeError as error:
        return error.what
    return None
