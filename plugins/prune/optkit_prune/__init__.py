"""Pruners that come with optkit. One file an algorithm."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_transforms() -> Registration:
    return {
        "prune.layers": "optkit_prune.layers:Layers",
        "prune.magnitude": "optkit_prune.magnitude:Magnitude",
        "prune.random": "optkit_prune.random:Random",
        "prune.recover": "optkit_prune.recover:Recover",
        "prune.sparsegpt": "optkit_prune.sparsegpt:SparseGPT",
        "prune.structured": "optkit_prune.structured:Structured",
        "prune.svd": "optkit_prune.svd:SVD",
        "prune.wanda": "optkit_prune.wanda:Wanda",
    }
