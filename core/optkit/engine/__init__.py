"""The engine: requests, KV blocks, sampling, and the step loop that drives any session with any batcher."""

from optkit.engine.loop import Engine
from optkit.engine.request import Event, PromptFacts, Request, SamplingParams, Structure, TokenLogprob
from optkit.engine.stats import Stats

__all__ = ["Engine", "Event", "PromptFacts", "Request", "SamplingParams", "Stats", "Structure", "TokenLogprob"]
