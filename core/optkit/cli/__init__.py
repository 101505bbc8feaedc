"""The command line. The only part of optkit that prints or exits."""

from optkit.cli.app import main

__all__ = ["main"]
