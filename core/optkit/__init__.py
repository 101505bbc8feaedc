"""optkit: compose, measure and ship inference optimizations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optkit.engine.async_llm import AsyncLLM
    from optkit.engine.client import WorkerEngine
    from optkit.engine.encoder import Encoder
    from optkit.engine.llm import LLM
    from optkit.engine.opened import Speculation
    from optkit.engine.request import SamplingParams, Structure
    from optkit.engine.tensor_client import WorkerTensors

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "Encoder", "SamplingParams", "Speculation", "Structure", "WorkerEngine", "WorkerTensors"]

_PLACES = {
    "LLM": "optkit.engine.llm",
    "AsyncLLM": "optkit.engine.async_llm",
    "Encoder": "optkit.engine.encoder",
    "SamplingParams": "optkit.engine.request",
    "Speculation": "optkit.engine.opened",
    "Structure": "optkit.engine.request",
    "WorkerEngine": "optkit.engine.client",
    "WorkerTensors": "optkit.engine.tensor_client",
}


def __getattr__(name: str) -> object:
    # Imported when they are first named: `import optkit` stays as quick as the commands that need none of them.
    if name not in _PLACES:
        raise AttributeError(f"module 'optkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
