"""What goes together in a model, as torch-pruning's dependency graph has it.

The graph is asked for whole groups (Fang et al., DepGraph, arXiv:2301.12900), and what stays is chosen here, since the
library's own pruners skip what they cannot prune, and remove a KV head with any of its query heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning.ops import OPTYPE

from optkit.blockwise import output_of
from optkit.errors import OptkitError
from optkit_prune.structured.layout import Attention, attentions, feeds, heads_pool, width_pool
from optkit_prune.structured.pools import Pool
from optkit_prune.structured.structures import Cut, Side, Structure, head_size, tensors_of

__all__ = ["structures_of"]

_MIXING = (OPTYPE.CONCAT, OPTYPE.SPLIT, OPTYPE.RESHAPE, OPTYPE.SLICE, OPTYPE.UNBIND)

Batch = Mapping[str, Tensor]


def structures_of(
    module: nn.Module, parts: Sequence[str], example: Batch, *, round_to: int, kv_groups: bool
) -> list[Structure]:
    """What can be pruned of a model.

    Args:
        module: on the CPU. Nothing of it changes, but attentions are traced in their plain form.
        parts: `ffn`, `heads`, `width`, `channels`.
        example: a batch to trace it with.
        round_to: for FFNs, width and channels.
        kv_groups: whether heads go with their KV head.

    Raises:
        RecipeError: it has no such part.
        OptkitError: the graph ties something else to a part than what belongs to it.
    """
    with _eager(module):
        graph = _Graph(module, example)
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    found: list[Structure] = []
    if "ffn" in parts:
        for feed in feeds(linears):
            pool = Pool(f"ffn {feed.block}", "ffn", linears[feed.down].in_features, round_to)
            cuts = graph.group(feed.down, "in")
            _check_members(pool, cuts, {*feed.inner, feed.down})
            found.append(Structure(pool, tuple(cuts)))
    if "heads" in parts:
        found += [_heads(graph, linears, attention, kv_groups=kv_groups) for attention in attentions(linears)]
    if "width" in parts:
        embedding: Any = module.get_input_embeddings()  # type: ignore[operator]  # transformers' own
        owner = attentions(linears)[0]
        heads = linears[owner.queries].out_features // head_size(module.get_submodule(owner.owner))
        config: Any = module.config
        pool = width_pool(config.model_type, embedding.embedding_dim, heads, round_to)
        found.append(Structure(pool, tuple(graph.group(graph.path(embedding), "both"))))
    if "channels" in parts:
        found += _channels(graph, round_to)
    return found


def _heads(graph: _Graph, linears: Mapping[str, Any], attention: Attention, *, kv_groups: bool) -> Structure:
    size = head_size(graph.module.get_submodule(attention.owner))
    queries, keys = linears[attention.queries].out_features, linears[attention.keys].out_features
    pool = heads_pool(attention, queries, keys, size, kv_groups=kv_groups)
    cuts = {cut.path: cut for cut in graph.group(attention.output, "in")}
    # Norms of heads are as long as one head, whichever stay.
    tied = [cut for cut in cuts.values() if cut.side != "parameter"]
    members = {attention.queries, attention.keys, attention.values, attention.output}
    _check_members(pool, tied, members)

    def by_head(path: str, heads: int) -> Cut:
        cut = cuts[path]
        places = torch.arange(heads * size)
        return Cut(path, cut.side, places, places // (heads * size // pool.units), cut.remove)

    chosen = [by_head(path, queries // size) for path in (attention.queries, attention.output)]
    # The graph would take a KV head with any one of its query heads; it stays, as the others read it.
    if not pool.shared:
        chosen += [by_head(path, keys // size) for path in (attention.keys, attention.values)]
    return Structure(pool, tuple(chosen))


def _channels(graph: _Graph, round_to: int) -> list[Structure]:
    found: list[Structure] = []
    seen: set[str] = set()
    for path, layer in graph.module.named_modules():
        if not isinstance(layer, _ConvNd) or path in seen or not graph.reached(layer):
            continue
        cuts = graph.group(path, "out")
        seen |= {cut.path for cut in cuts if cut.side != "in"}
        # What the model gives keeps its channels.
        if not graph.gives(path):
            _check_channels(graph.module, path, cuts)
            found.append(Structure(Pool(f"channels {path}", "channels", layer.out_channels, round_to), tuple(cuts)))
    if not found:
        raise OptkitError("has no convolution whose channels could go", where="the model", remedy="prune another part")
    return found


def _check_channels(module: nn.Module, path: str, cuts: Iterable[Cut]) -> None:
    remedy = "prune the model another way"
    for cut in cuts:
        layer: Any = None if cut.side == "parameter" else module.get_submodule(cut.path)
        depthwise = isinstance(layer, _ConvNd) and layer.groups == layer.out_channels
        if getattr(layer, "num_groups", 1) != 1 or (getattr(layer, "groups", 1) != 1 and not depthwise):
            what = f"its channels go through {cut.path}, which has groups of channels"
            raise OptkitError(what, where=path, remedy=remedy)
        sizes = [module.get_parameter(name).shape[axis] for name, axis in tensors_of(module, cut).items()]
        if int(cut.places.max()) >= min(sizes, default=0):
            what = f"the graph of dependencies takes them for channels of {cut.path}, which has fewer"
            raise OptkitError(what, where=path, remedy=remedy)


def _check_members(pool: Pool, cuts: Iterable[Cut], expected: set[str]) -> None:
    members = {cut.path for cut in cuts}
    if members != expected:
        odd = sorted(members ^ expected)[0]
        what = "is not tied to it" if odd in expected else "would have to go with it"
        raise OptkitError(f"{odd} {what}, by the graph of dependencies", where=pool.key, remedy="prune another part")


class _Graph:
    """torch-pruning's dependency graph of a module."""

    def __init__(self, module: nn.Module, example: Batch) -> None:
        self.module = module
        wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
        module.requires_grad_(True)  # the trace follows gradients
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._graph = torch_pruning.DependencyGraph().build_dependency(
                    module, dict(example), forward_fn=_outputs, verbose=False
                )
        finally:
            for parameter, needed in wanted.items():
                parameter.requires_grad_(needed)
        if "input_ids" in example:
            self._mix_no_axes()
        self._paths: dict[object, str] = {layer: name for name, layer in module.named_modules()}
        self._paths |= {parameter: name for name, parameter in module.named_parameters()}

    def _mix_no_axes(self) -> None:
        """Let features keep their places through a transformer's reshapes, slices and concatenations.

        These are of heads, positions and halves of rotary embeddings. torch-pruning tells axes apart by their sizes;
        where two query heads share a KV head it takes the halves for features, and goes round in circles for ever.
        """
        for node in self._graph.module2node.values():
            if node.type in _MIXING:
                node.type = OPTYPE.ELEMENTWISE
            for dependency in node.dependencies:
                # Those of expanded KV heads it finds again.
                dependency.index_mapping = [None, None]

    def path(self, layer: object) -> str:
        return self._paths[layer]

    def reached(self, layer: nn.Module) -> bool:
        """Whether a run of the model came by."""
        return layer in self._graph.module2node

    def group(self, path: str, side: Side) -> list[Cut]:
        """All that goes with the entries of a layer on one side."""
        return list(self._cuts(self._whole(path, side)))

    def gives(self, path: str) -> bool:
        """Whether the channels that a layer makes are also what the model gives."""
        return any(
            not item.dep.target.outputs
            for item in self._whole(path, "out")
            if self._graph.is_out_channel_pruning_fn(item.dep.handler)
        )

    def _whole(self, path: str, side: Side) -> Any:
        layer = self.module.get_submodule(path)
        pruner = self._graph.get_pruner_of_module(layer)
        count = (pruner.get_in_channels if side == "in" else pruner.get_out_channels)(layer)
        remove = pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
        return self._graph.get_pruning_group(layer, remove, list(range(count)))

    def _cuts(self, group: Any) -> Iterator[Cut]:
        for item in group:
            target = item.dep.target
            if target.module not in self._paths:
                continue  # an operation
            roots = item.root_idxs
            order = sorted(range(len(roots)), key=list(item.idxs).__getitem__)
            # Of grouped queries the graph forgets where KV heads come from.
            units = torch.tensor([-1 if roots[index] is None else roots[index] for index in order])
            where = torch.tensor([item.idxs[index] for index in order]), units
            path = self._paths[target.module]
            if target.type == OPTYPE.PARAMETER:
                axis = target.pruning_dim
                yield Cut(path, "parameter", *where, _parameter(self.module, path, axis), axis)
            elif self._graph.get_pruner_of_module(target.module).get_out_channels(target.module) is not None:
                out = self._graph.is_out_channel_pruning_fn(item.dep.handler)
                both = out and self._graph.is_in_channel_pruning_fn(item.dep.handler)
                yield Cut(path, "both" if both else "out" if out else "in", *where, item.dep)


def _outputs(module: nn.Module, batch: Batch) -> Any:
    return output_of(module, batch) if hasattr(module, "config") else module(**batch)


def _parameter(module: nn.Module, path: str, axis: int) -> Callable[[list[int]], object]:
    owner, _, name = path.rpartition(".")

    def remove(places: list[int]) -> None:
        part = module.get_submodule(owner)
        setattr(part, name, nn.Parameter(_without(getattr(part, name), axis, places)))

    return remove


def _without(tensor: Tensor, axis: int, places: Sequence[int]) -> Tensor:
    kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
    kept[list(places)] = False
    return tensor.detach().index_select(axis, kept.nonzero().flatten())


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    """With attentions of plain matrix products: the graph of a fused one does not say whose values it mixes."""
    config = getattr(module, "config", None)
    former = getattr(config, "_attn_implementation", None)
    if former is None or former == "eager":
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(former)
