"""Batching strategies that come with optkit. One file each."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_batchers() -> Registration:
    return {"static": "optkit_batching.static:Static"}
