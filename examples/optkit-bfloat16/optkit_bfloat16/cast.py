"""Weights rounded to bfloat16, and stored so."""

from __future__ import annotations

from optkit.model import Model, ModelCard
from optkit.transforms import Transform, TransformContext

__all__ = ["BFloat16"]


class BFloat16(Transform):
    """Stores every weight in bfloat16, so that the artifact's `weights` folder takes half the bytes.

    Nothing is lost for a model that was published in bfloat16. Of others each weight moves by at most 0.4%. Only that
    folder shrinks: runtimes read the rounded weights as float32, so that nothing gets faster and no memory is saved.
    Put it last: a later step reads float32, and stores that.

    Paper: Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, arXiv:1905.12322.
    """

    requires = frozenset({"weights:float"})
    # Integer weights come with float32 scales, and what reads them expects the other tensors in float32 as well.
    conflicts = frozenset({"weights:int*", "stored:bfloat16"})

    def provides(self) -> frozenset[str]:
        return frozenset({"stored:bfloat16"})

    def bits_per_weight(self, card: ModelCard) -> float:
        return 16

    def apply(self, model: Model, context: TransformContext) -> Model:
        import torch

        # Not `module.to`: it would round buffers too, among them the rotary frequencies, which no file stores.
        parameters = [one for one in model.module.parameters() if one.is_floating_point()]
        for done, parameter in enumerate(parameters):
            context.progress(done, len(parameters), "round")
            parameter.data = parameter.data.to(torch.bfloat16)
        context.progress(len(parameters), len(parameters), "done")
        # transformers loads a folder in the precision that its config.json names.
        model.module.config.dtype = torch.bfloat16
        return model.tagged(*self.provides())
