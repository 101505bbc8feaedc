"""Taking units out of a model, and making sure that just these went."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optkit.blockwise import output_of
from optkit.errors import OptkitError
from optkit_prune.structured.layout import attentions, feeds
from optkit_prune.structured.structures import Cut, Structure, cost_of, head_size, masked

__all__ = ["cut", "name_head_size"]

Batch = Mapping[str, Tensor]


def cut(module: nn.Module, structures: Sequence[Structure], gone: Mapping[str, Tensor], example: Batch) -> None:
    """Take units out of a model, in place.

    Args:
        module: on the CPU; it needs gradients afterwards where it did before.
        structures: of it.
        gone: by pool, the units to take, `[units]` bool.
        example: a batch on which the result is compared with the model whose units are at zero.

    Raises:
        OptkitError: a tensor has another shape than was asked for, or the model computes something else.
    """
    wanted = {name: parameter.requires_grad for name, parameter in module.named_parameters(remove_duplicate=False)}
    kept = {key: int((~mask).sum()) for key, mask in gone.items()}
    expected = dict(zip(_names(module), cost_of(module, structures, example, flops=False).terms, strict=True))
    # Norms take the mean over the width, so that no zeros stand for a narrower model.
    exact = [structure for structure in structures if structure.pool.part != "width"]
    tied = _tied(module)
    with torch.no_grad():
        if exact:
            masks = {key: (~mask).float() for key, mask in gone.items()}
            with masked(module, exact, masks):
                before = output_of(module, example)
            _remove(exact, gone)
            _settle(module, {structure.pool.part for structure in exact})
            _check_same(output_of(module, example), before)
        rest = [structure for structure in structures if structure.pool.part == "width"]
        if rest:
            _remove(rest, gone)
            _narrow(module, rest[0].pool.units, kept["width"])
            for name, first in tied.items():
                _set(module, name, module.get_parameter(first))
            if not output_of(module, example).isfinite().all():
                raise OptkitError("gives NaN or infinite numbers after pruning", where="the model")
    for name, parameter in module.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(wanted[name])
        term = expected.get(name)
        if term is not None and tuple(parameter.shape) != term.shape(kept):
            raise OptkitError(
                f"pruning left {tuple(parameter.shape)}, and {term.shape(kept)} was asked for", where=name
            )


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _tied(module: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several, with the first."""
    first: dict[nn.Parameter, str] = {}
    pairs = [(name, first.setdefault(value, name)) for name, value in module.named_parameters(remove_duplicate=False)]
    return {name: own for name, own in pairs if name != own}


def _set(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, parameter)


def _remove(structures: Iterable[Structure], gone: Mapping[str, Tensor]) -> None:
    # Of one side at once, whichever pools its entries belong to: what is left would have other places.
    places: dict[tuple[str, str], list[int]] = {}
    cuts: dict[tuple[str, str], Cut] = {}
    for structure in structures:
        mask = gone[structure.pool.key]
        for part in structure.cuts:
            cuts[part.path, part.side] = part
            places.setdefault((part.path, part.side), []).extend(part.places[mask[part.units]].tolist())
    for side, part in cuts.items():
        part.remove(sorted(places[side]))


def _settle(module: nn.Module, parts: Collection[str]) -> None:
    """Let FFNs and attentions know their sizes."""
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    for feed in feeds(linears) if "ffn" in parts else ():
        owner = module.get_submodule(feed.inner[0].rpartition(".")[0])
        _note(owner, intermediate_size=linears[feed.down].in_features)
    for attention in attentions(linears) if "heads" in parts else ():
        owner = module.get_submodule(attention.owner)
        size = head_size(owner)
        heads, groups = (linears[path].out_features // size for path in (attention.queries, attention.keys))
        _note(owner, num_heads=heads, num_attention_heads=heads, all_head_size=heads * size)
        _note(owner, num_key_value_heads=groups, num_key_value_groups=heads // groups)


def _note(module: nn.Module, **sizes: int) -> None:
    for name, size in sizes.items():
        if type(vars(module).get(name)) is int:
            setattr(module, name, size)


def _narrow(module: Any, before: int, width: int) -> None:
    for part in module.modules():
        if vars(part).get("hidden_size") == before:
            part.hidden_size = width
    module.config.hidden_size = width


def _check_same(found: Tensor, expected: Tensor) -> None:
    close = found.shape == expected.shape and torch.allclose(
        found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    if not close:
        raise OptkitError(
            "without some units it does not compute what it does with these at zero",
            where="the model",
            remedy="something reads them past the layers; prune another part",
        )


def name_head_size(module: Any, parts: Collection[str]) -> None:
    """Write the size of heads down in a configuration where it no longer follows from the width.

    Encoders have no place for it.
    """
    if not {"heads", "width"} & set(parts):
        return
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    owner = module.get_submodule(attentions(names)[0].owner)
    if getattr(owner, "head_dim", None) is not None:
        module.config.head_dim = head_size(owner)
