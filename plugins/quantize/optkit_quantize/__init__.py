"""Quantizers that come with optkit. One file an algorithm."""

from optkit.hookspecs import Registration, hookimpl


@hookimpl
def register_transforms() -> Registration:
    return {"quantize.rtn": "optkit_quantize.rtn:RTN"}
