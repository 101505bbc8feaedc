"""OpenVINO's reader of torch's graphs, with the operators of our quantized layers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension

from optkit_backends.openvino.layers import CONVERSIONS

__all__ = ["quiet", "reader"]


def reader(spelt: Callable[[str], str] = str) -> Any:
    """The frontend for torch. Not `openvino.convert_model`, which tells its makers of every call over the network.

    Args:
        spelt: how the graph spells what torch.jit calls `library::operator`.
    """
    frontend = FrontEndManager().load_by_framework("pytorch")
    for operator, conversion in CONVERSIONS.items():
        frontend.add_extension(ConversionExtension(spelt(operator), conversion))
    return frontend


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and the frontend tell those who work on them."""
    silent, level = logging.NullHandler(), logging.root.manager.disable
    # The frontend logs to the root logger, which would get a handler for ever if it had none.
    logging.root.addHandler(silent)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        logging.root.removeHandler(silent)
