"""The engine: requests, KV blocks, sampling, and the step loop that drives any session with any batcher."""

from optkit.engine.blocks import BlockPool
from optkit.engine.loop import Engine
from optkit.engine.request import Event, Request, SamplingParams

__all__ = ["BlockPool", "Engine", "Event", "Request", "SamplingParams"]
