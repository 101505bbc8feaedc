"""optkit: compose, measure and ship inference optimizations."""

__version__ = "0.1.0"
