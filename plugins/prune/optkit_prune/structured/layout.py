"""Where a transformer's parts are, by the names of its linear layers, and what its card says of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from optkit.errors import RecipeError
from optkit.model import ModelCard
from optkit_prune.structured.pools import Cost, Kept, Pool, Term

__all__ = ["Attention", "Feed", "Sheet", "attentions", "feeds", "heads_pool", "sheet_of", "width_pool"]

Shape = tuple[int, int]

# Of others, code or buffers depend on the width.
_WIDE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@dataclass(frozen=True, slots=True)
class Feed:
    """Paths of an FFN's linear layers."""

    block: str
    inner: tuple[str, ...]
    """Those that make the channels."""
    down: str
    """The one that reads them."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Paths of an attention's linear layers."""

    block: str
    queries: str
    keys: str
    values: str
    output: str

    @property
    def owner(self) -> str:
        """The module that splits them into heads."""
        return self.queries.rpartition(".")[0]


_FEEDS = ((("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"), (("intermediate.dense",), "output.dense"))
_ATTENTIONS = (
    tuple(f"self_attn.{name}_proj" for name in "qkvo"),
    (*(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense"),
)


def feeds(linears: Iterable[str]) -> list[Feed]:
    """The FFNs of a model, by the paths of its linear layers.

    Raises:
        RecipeError: there is none whose layers have known names.
    """
    names = list(linears)
    found = [
        Feed(block, tuple(f"{block}.{name}" for name in inner), f"{block}.{down}")
        for inner, down in _FEEDS
        for block in _blocks(names, (*inner, down))
    ]
    if not found:
        raise _unknown("ffn", "gate_proj, up_proj and down_proj or intermediate.dense and output.dense")
    return found


def attentions(linears: Iterable[str]) -> list[Attention]:
    """The attentions of a model, by the paths of its linear layers.

    Raises:
        RecipeError: there is none whose layers have known names.
    """
    names = list(linears)
    found = [
        Attention(block, *(f"{block}.{name}" for name in parts))
        for parts in _ATTENTIONS
        for block in _blocks(names, parts)
    ]
    if not found:
        raise _unknown("heads", "q_proj, k_proj, v_proj and o_proj or query, key, value and output.dense")
    return found


def _blocks(names: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Paths of the modules that have all these parts, in the model's order."""
    there, last = set(names), f".{parts[-1]}"
    blocks = [name.removesuffix(last) for name in names if name.endswith(last)]
    return [block for block in blocks if all(f"{block}.{part}" in there for part in parts)]


def _unknown(part: str, known: str) -> RecipeError:
    return RecipeError(f"{part}: no block has linear layers that are named {known}", remedy="prune another part")


@dataclass(frozen=True, slots=True)
class Sheet:
    """A model's pools, and its tensors as far as its card tells.

    Attributes:
        pools: of the parts asked for.
        linears: tensors of linear layers, by path.
        others: the other parameters.
    """

    card: ModelCard
    pools: tuple[Pool, ...]
    linears: Mapping[str, Term]
    others: tuple[Term, ...]

    def cost(self, *, flops: bool = False) -> Cost:
        """Of its parameters, or of its multiplications for a token."""
        return Cost([*self.linears.values(), *self.others], flops)

    def after(self, kept: Kept) -> ModelCard:
        """The card with what stays."""
        card, pairs = self.card, {name: term.shape(kept) for name, term in self.linears.items()}
        linears: dict[str, Shape] = {name: (shape[0], shape[1]) for name, shape in pairs.items()}
        cached = card.kv_values_per_token
        if cached and any(pool.part == "heads" for pool in self.pools):
            keys = [attention.keys for attention in attentions(linears)]
            whole = sum(card.linears[name][0] for name in keys)
            cached = cached * sum(linears[name][0] for name in keys) // whole
        return replace(
            card,
            linears=linears,
            parameters=round(self.cost().of(kept)),
            hidden_size=kept.get("width", card.hidden_size),
            kv_values_per_token=cached,
        )


def sheet_of(card: ModelCard, parts: Iterable[str], *, round_to: int, kv_groups: bool) -> Sheet:
    """The pools of a card's model.

    Args:
        card: of a transformer.
        parts: to prune.
        round_to: channels of FFNs, and the width, that stay are multiples of it.
        kv_groups: whether heads go with their KV head.

    Raises:
        RecipeError: the model has no such part, or none that could be found.
    """
    pools: list[Pool] = []
    axes: dict[str, list[Pool | None]] = {name: [None, None] for name in card.linears}
    if "width" in parts:
        architecture = _architecture(card)
        queries = card.linears[attentions(axes)[0].queries][0]
        heads = queries // card.head_size if card.head_size else 1
        pools.append(width_pool(architecture, card.hidden_size, heads, round_to))
        writers = {feed.down for feed in feeds(axes)} | {attention.output for attention in attentions(axes)}
        for name, axis in axes.items():
            axis[0 if name in writers else 1] = pools[0]
    if "ffn" in parts:
        for feed in feeds(axes):
            pool = Pool(f"ffn {feed.block}", "ffn", card.linears[feed.down][1], round_to)
            pools.append(pool)
            axes[feed.down][1] = pool
            for name in feed.inner:
                axes[name][0] = pool
    if "heads" in parts:
        for attention in attentions(axes):
            queries, keys = (card.linears[name][0] for name in (attention.queries, attention.keys))
            pool = heads_pool(attention, queries, keys, card.head_size, kv_groups=kv_groups)
            pools.append(pool)
            axes[attention.queries][0] = axes[attention.output][1] = pool
            if not pool.shared:
                axes[attention.keys][0] = axes[attention.values][0] = pool
    linears = {name: Term(shape, _along(shape, axes[name]), 1.0) for name, shape in card.linears.items()}
    return Sheet(card, tuple(pools), linears, _others(card, linears, pools))


def _along(shape: Shape, pools: Sequence[Pool | None]) -> tuple[tuple[tuple[Pool, int], ...], ...]:
    """All entries of an axis for its pool."""
    pairs = zip(shape, pools, strict=True)
    return tuple(() if pool is None else ((pool, size),) for size, pool in pairs)


def heads_pool(attention: Attention, queries: int, keys: int, size: int, *, kv_groups: bool) -> Pool:
    """The pool of an attention's heads.

    Args:
        attention: where they are.
        queries: features of all query heads.
        keys: features of all key heads.
        size: features of a head.
        kv_groups: whether query heads go with their KV head, all that share it at once.

    Raises:
        RecipeError: the sizes are no whole numbers of heads.
    """
    if not size or queries % size or keys % size or queries % keys:
        what = f"heads: {queries} and {keys} features are no whole numbers of heads of {size}"
        raise RecipeError(what, found=attention.owner, remedy="leave heads out of parts")
    key, groups = f"heads {attention.block}", keys // size
    # Without grouped queries a head has its keys and values for itself.
    if kv_groups or queries == keys:
        return Pool(key, "heads", groups, 1)
    return Pool(key, "heads", queries // size, groups, groups, shared=True)


def width_pool(architecture: str, width: int, heads: int, round_to: int) -> Pool:
    """The pool of a model's width.

    Args:
        architecture: as transformers names it.
        width: of the embeddings.
        heads: query heads of an attention.
        round_to: what stays is a multiple of it.

    Raises:
        RecipeError: of this architecture the width cannot be pruned.
    """
    if architecture not in _WIDE:
        what = f"width: can be pruned of the language models {', '.join(_WIDE)}"
        raise RecipeError(what, found=architecture, remedy="prune ffn or heads")
    # Llama's configuration wants a width that its heads divide, of whatever size they are.
    return Pool("width", "width", width, math.lcm(round_to, heads) if architecture == "llama" else round_to)


def _architecture(card: ModelCard) -> str:
    return next((tag.removeprefix("arch:") for tag in sorted(card.tags) if tag.startswith("arch:")), "unknown")


def _others(card: ModelCard, linears: Mapping[str, Term], pools: Sequence[Pool]) -> tuple[Term, ...]:
    """Embeddings, biases and norms. A tied embedding counts as the head."""
    rest = card.parameters - sum(math.prod(term.sizes) for term in linears.values())
    biased: tuple[str, ...] = ()
    if "task:causal-lm" not in card.tags:
        biased = tuple(linears)
    elif "arch:qwen2" in card.tags:
        biased = tuple(name for name in linears if name.endswith(("q_proj", "k_proj", "v_proj")))
    found = [Term(linears[name].sizes[:1], linears[name].pools[:1]) for name in biased]
    rest -= sum(term.sizes[0] for term in found)
    width = next((pool for pool in pools if pool.part == "width"), None)
    # Norms of heads have the size of a head; everything else is as wide as the model.
    fixed = 2 * card.head_size * card.layers if "arch:qwen3" in card.tags else 0
    wide = (rest - fixed) // card.hidden_size
    found.append(Term((card.hidden_size, wide), _along((card.hidden_size, wide), (width, None))))
    found.append(Term((rest - wide * card.hidden_size,), ((),)))
    return tuple(found)
