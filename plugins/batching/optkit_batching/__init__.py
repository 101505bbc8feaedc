"""Batching strategies that come with optkit. One file each."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_batchers() -> Registration:
    return {
        "continuous": "optkit_batching.continuous:Continuous",
        "static": "optkit_batching.static:Static",
        "dynamic": "optkit_batching.dynamic:Dynamic",
        "bucketed": "optkit_batching.bucketed:Bucketed",
    }
