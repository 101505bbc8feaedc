"""Magnitude pruning: the smallest weights of each layer become zero."""

from __future__ import annotations

from pydantic import Field

from optkit.model import Model, ModelCard
from optkit.targets import select
from optkit.transforms import Transform, TransformContext

__all__ = ["Magnitude"]


class Magnitude(Transform):
    """Unstructured pruning: in each layer the given share of weights with the smallest magnitude becomes zero.

    Costs a second and no data. Dense kernels run zeros at full price, so nothing gets faster by it; a file shrinks only
    when it is compressed. Comes before quantization, which keeps zeros zero.

    Paper: Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv:1506.02626.
    """

    requires = frozenset({"weights:float"})
    conflicts = frozenset({"weights:int*", "sparsity:*"})

    sparsity: float = Field(gt=0, le=0.95)
    """Share of zeros in each layer."""
    targets: tuple[str, ...] = ("Linear",)
    """Layers to prune: `Linear` for all linear layers, exact module paths, or patterns that start with `re:`."""
    ignore: tuple[str, ...] = ("lm_head",)
    """Layers to leave dense, spelt like `targets`."""

    def provides(self) -> frozenset[str]:
        return frozenset({"sparsity:unstructured"})

    def check(self, card: ModelCard) -> None:
        select(card.linears, self.targets, self.ignore)

    def apply(self, model: Model, context: TransformContext) -> Model:
        import torch

        linears = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear)}
        chosen = select(linears, self.targets, self.ignore)
        for done, name in enumerate(chosen):
            context.progress(done, len(chosen), name)
            weight = linears[name].weight.data.flatten()
            # By rank, not by threshold: ties at the threshold would prune too many.
            smallest = weight.abs().argsort(stable=True)[: round(self.sparsity * weight.numel())]
            weight[smallest] = 0
        context.progress(len(chosen), len(chosen), "done")
        return model.tagged(*self.provides())
