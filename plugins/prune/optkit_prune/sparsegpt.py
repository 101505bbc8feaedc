"""SparseGPT: one input feature after another is pruned, and the weights still to come make good its error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from optkit.model import Model, ModelCard
from optkit.targets import select
from optkit.transforms import TransformContext
from optkit_prune.masks import checked, lowest, lowest_of_each
from optkit_prune.owl import Allocated

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SparseGPT", "sparsegpt_prune"]


class SparseGPT(Allocated):
    """Pruning on a mask that changes the weights that stay, so that the layer's outputs on calibration data stay the
    same.

    Costs two runs of the model on the calibration data, four with `allocation: owl`, and with 8 windows of 512 tokens
    2.5 s of one core for each block of SmolLM2-135M. Memory is that of a block and six float64 copies of its largest
    Hessian, the square of a layer's input features. At 50% zeros that model's perplexity rises from 14.8 to 21.7, with
    Wanda to 28.9, by magnitude to 375. Dense kernels run zeros at full price, so nothing gets faster by it; a file
    shrinks only when it is compressed. Not without calibration data like the model's later inputs, and not after a
    change that must be kept in the weights that stay, such as a merged adapter: take `prune.wanda`.

    A layer's `round(sparsity * n)` zeros are shared out among blocks of `block_size` input features, each of which is
    chosen when the features before it are done, from all its outputs together. Features that never have an input on the
    calibration data count as if they had inputs as small as the damping says.

    Paper: Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
    arXiv:2301.00774.
    """

    damping: float = Field(default=0.01, gt=0, le=1)
    """Share of the Hessian's mean diagonal that is added to all of its diagonal: more trusts the calibration data less.
    Where a Hessian is still not positive definite, ten and a hundred times as much are tried."""
    block_size: int = Field(default=128, ge=1, le=4096)
    """Input features whose weights are chosen together; with a pattern a matter of speed alone."""

    def work_bytes(self, card: ModelCard) -> int:
        largest = max(card.linears[name][1] for name in select(card.linears, self.targets, self.ignore))
        return 6 * 8 * largest * largest

    def apply(self, model: Model, context: TransformContext) -> Model:
        from optkit.blockwise import walk
        from optkit.hessians import Hessians, inverse_cholesky

        zeros = self.allocated(model, context) if self.group is None else {}
        for block in walk(model.module, context, list(self.chosen(model.module))):
            layers: dict[str, Any] = {name: model.module.get_submodule(name) for name in block.names}
            weights = {name: checked(layer.weight, name) for name, layer in layers.items()}
            hessians = Hessians()
            block.watch(block.names, hessians.see)
            for names in hessians.sharing(block.names):
                inverse = inverse_cholesky(hessians.of(names[0]), self.damping, names[0])
                for name in names:
                    amount = self.group or zeros[name]
                    pruned = sparsegpt_prune(weights[name], inverse, amount, block_size=self.block_size)
                    layers[name].weight.data.copy_(pruned)
        return model.tagged(*self.provides())


def sparsegpt_prune(weight: Tensor, inverse: Tensor, amount: int | tuple[int, int], *, block_size: int = 128) -> Tensor:
    """Prune a weight matrix so that `(w - p) H (w - p)^T`, summed over its rows, stays small.

    Args:
        weight: `[out, in]` float32, finite.
        inverse: `[in, in]` float32, the lower triangular `C` with `C C^T = H^-1` that `inverse_cholesky` gives.
        amount: how many weights become zero; or N and M of a pattern, where M divides `in`.
        block_size: features whose weights are chosen together, by `(w / C[j, j])^2`. With a pattern each group is
            chosen by itself.

    Returns:
        `[out, in]` float32.
    """
    import torch

    features = len(inverse)
    group = None if isinstance(amount, int) else amount
    if group is not None:
        block_size = max(group[1], block_size - block_size % group[1])
    # A feature's weights lie together: [in, out].
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    for start in range(0, features, block_size):
        end = min(features, start + block_size)
        part, shares = columns[start:end], inverse[start:end, start:end]
        own = shares.diagonal().unsqueeze(1)
        mask = torch.zeros_like(part, dtype=torch.bool)
        if isinstance(amount, int):
            count = amount * end // features - amount * start // features
            mask = lowest((part / own).square().reshape(1, -1), [count]).reshape(part.shape)
        errors = torch.empty_like(part)
        for feature in range(end - start):
            before = errors[:feature]
            if group is not None and feature % group[1] == 0:
                next_ones = slice(feature, feature + group[1])
                now = torch.addmm(part[next_ones], shares[next_ones, :feature], before, alpha=-1)
                mask[next_ones] = lowest_of_each((now / own[next_ones]).square().T, group).T
            column = torch.addmv(part[feature], before.T, shares[feature, :feature], alpha=-1)
            torch.div(column.masked_fill(~mask[feature], 0), own[feature], out=errors[feature])
            part[feature] = column.masked_fill(mask[feature], 0)
        columns[end:].addmm_(inverse[end:, start:end], errors, alpha=-1)
    return columns.T.contiguous()
