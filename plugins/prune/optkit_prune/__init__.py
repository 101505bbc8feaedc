"""Pruners that come with optkit. One file an algorithm."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_transforms() -> Registration:
    return {"prune.magnitude": "optkit_prune.magnitude:Magnitude"}
