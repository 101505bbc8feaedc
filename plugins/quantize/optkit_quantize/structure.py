"""Which linear layers of a decoder block read one tensor, what makes that tensor, and scales folded in between.

A scale for each channel that divides what makes a tensor and multiplies the weights that read it leaves the model's
outputs as they are (Xiao et al., SmoothQuant, arXiv:2211.10438, section 4; Lin et al., AWQ, arXiv:2306.00978,
section 3). It can be chosen so that the weights, or the tensor, are easier to round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optkit.errors import OptkitError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.blockwise import Block

__all__ = ["ARCHITECTURES", "Feed", "Inputs", "Layout", "fold", "fused_groups", "inputs_of", "layout_of"]

_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers that runtimes may run as one matrix, and that must therefore share a precision.

    Args:
        names: paths of linear layers.

    Returns:
        Every name once: q, k and v of one attention together, gate and up of one MLP, any other layer alone; groups in
        the order of their first names.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for index, name in enumerate(names):
        parent, _, own = name.rpartition(".")
        # Layers of no kind are told apart by their place, which is below zero so that no kind has it.
        kind = next((kind for kind, fused in enumerate(_FUSED) if own in fused), -1 - index)
        groups.setdefault((parent, kind), []).append(name)
    return [tuple(group) for group in groups.values()]


@dataclass(frozen=True, slots=True)
class Feed:
    """Linear layers that read one tensor, and what makes it.

    Where query heads share the values of a KV head, the tensor repeats each of the producer's heads `copies` times, and
    the copies share their scales.
    """

    producer: str
    """Path of the norm or linear layer that makes the tensor."""
    readers: tuple[str, ...]
    """Paths of the linear layers that read it."""
    scope: str
    """Path of the module whose output shows what an error in the readers does: attention, MLP, or the reader itself."""
    offset: float = 0.0
    """What a norm adds to its weight to get its gain."""
    copies: int = 1
    head_size: int = 1
    from_norm: bool = False
    """Whether a norm makes the tensor."""

    def spread(self, scale: Tensor) -> Tensor:
        """A value for each channel of the producer `[channels]` as one for each feature of the readers `[features]`."""
        return scale.reshape(-1, 1, self.head_size).expand(-1, self.copies, -1).flatten()

    def shared(self, values: Tensor) -> Tensor:
        """Values of the readers' features `[features]` by channel of the producer, `[channels, copies]`."""
        return values.reshape(-1, self.copies, self.head_size).transpose(1, 2).flatten(0, 1)


def fold(module: nn.Module, feed: Feed, scale: Tensor) -> None:
    """Divide what makes a feed's tensor by `scale`, and multiply the weights that read it.

    Args:
        module: the model.
        feed: of that model.
        scale: `[channels]` of the producer, float32, positive.
    """
    producer: Any = module.get_submodule(feed.producer)
    if feed.from_norm:
        producer.weight.data = (producer.weight + feed.offset) / scale - feed.offset
    else:
        producer.weight.data = producer.weight / scale.unsqueeze(1)
        if producer.bias is not None:
            producer.bias.data = producer.bias / scale
    for name in feed.readers:
        reader: Any = module.get_submodule(name)
        reader.weight.data = reader.weight * feed.spread(scale)


@dataclass(frozen=True, slots=True)
class Layout:
    """How an architecture names the parts of its decoder blocks."""

    mlp_norm: str = "post_attention_layernorm"
    """The norm before the MLP."""
    offset: float = 0.0
    """What its norms add to their weights."""

    def linears(self, module: nn.Module) -> list[str]:
        """Paths of all linear layers of the blocks, in the model's order."""
        return [name for name, _ in module.named_modules() if name.rpartition(".")[2] in _PARTS]

    def feeds(self, module: nn.Module, block: str) -> tuple[Feed, ...]:
        """Those of the block at path `block`, in the order of computation."""
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        owner: Any = module.get_submodule(attention)
        queries, keys, values, output = (f"{attention}.{part}_proj" for part in "qkvo")
        gate, up, down = (f"{mlp}.{part}_proj" for part in ("gate", "up", "down"))
        copies = owner.o_proj.in_features // owner.v_proj.out_features
        return (
            Feed(f"{block}.input_layernorm", (queries, keys, values), attention, self.offset, from_norm=True),
            Feed(values, (output,), output, copies=copies, head_size=owner.head_dim),
            Feed(f"{block}.{self.mlp_norm}", (gate, up), mlp, self.offset, from_norm=True),
            Feed(up, (down,), down),
        )


_GEMMA2 = Layout("pre_feedforward_layernorm", 1.0)
_LAYOUTS = {
    "ernie4_5": Layout(),
    "gemma": Layout(offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "granite": Layout(),
    "helium": Layout(),
    "hunyuan_v1_dense": Layout(),
    "llama": Layout(),
    "ministral": Layout(),
    "mistral": Layout(),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "seed_oss": Layout(),
    "smollm3": Layout(),
}
ARCHITECTURES = tuple(_LAYOUTS)
"""Those whose structure is known, as transformers names them."""


def layout_of(tags: Iterable[str], *, what: str, remedy: str) -> Layout:
    """The layout of an architecture, by its `arch:*` tag.

    Args:
        tags: of a model, or of its card.
        what: what asks, for the error, such as `AWQ`.
        remedy: what to do without it.

    Raises:
        RecipeError: the architecture's structure is not known.
    """
    found = next((tag.removeprefix("arch:") for tag in sorted(tags) if tag.startswith("arch:")), "unknown")
    if found not in _LAYOUTS:
        known = ", ".join(ARCHITECTURES)
        raise RecipeError(f"{what} folds scales into models of the architectures {known}", found=found, remedy=remedy)
    return _LAYOUTS[found]


class Inputs:
    """What one layer gets on calibration data: magnitudes by feature, and a sample of the vectors.

    Args:
        vectors: that will come in all.
        sample: of them to keep, at random places that depend on `vectors` alone.
    """

    def __init__(self, vectors: int, sample: int) -> None:
        import torch

        places = torch.randperm(vectors, generator=torch.Generator().manual_seed(0))
        self._places = places[:sample].sort().values
        self._kept: list[Tensor] = []
        self._count = 0
        self._sum: Tensor | None = None
        self._largest: Tensor | None = None

    def see(self, input: Tensor) -> None:
        """Count in an input `[..., features]`."""
        import torch

        vectors = input.detach().reshape(-1, input.shape[-1]).float()
        magnitudes = vectors.abs()
        total, largest = magnitudes.sum(0), magnitudes.amax(0)
        self._sum = total if self._sum is None else self._sum + total
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        places = self._places - self._count
        self._kept.append(vectors[places[(places >= 0) & (places < len(vectors))].to(vectors.device)])
        self._count += len(vectors)

    @property
    def mean(self) -> Tensor:
        """Mean magnitude of each feature, `[features]` float32."""
        assert self._sum is not None
        return self._sum / self._count

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each feature, `[features]` float32."""
        assert self._largest is not None
        return self._largest

    @property
    def sample(self) -> Tensor:
        """`[vectors, features]` float32."""
        import torch

        return torch.cat(self._kept)


def inputs_of(
    block: Block, names: Iterable[str], vectors: int, sample: int = 0, also: Callable[[str, Tensor], None] | None = None
) -> dict[str, Inputs]:
    """What linear layers get, from one run of the block.

    Args:
        block: in which the layers are.
        names: their paths; one of the readers of a feed stands for all.
        vectors: tokens of the calibration data.
        sample: tokens to keep.
        also: gets every input too, with the layer's path.

    Raises:
        OptkitError: an input is not finite.
    """
    seen = {name: Inputs(vectors, sample) for name in names}

    def see(name: str, input: Tensor) -> None:
        seen[name].see(input)
        if also is not None:
            also(name, input)

    block.watch(seen, see)
    for name, inputs in seen.items():
        if not inputs.largest.isfinite().all():
            raise OptkitError(
                "its inputs on the calibration data are not finite",
                where=name,
                remedy="check the model, and the transforms before this one",
            )
    return seen
