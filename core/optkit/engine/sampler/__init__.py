"""From logits to tokens: all rows of a step at once, grouped by what they need."""

from optkit.engine.sampler.sampler import Sampled, Sampler, finite_rows, likeliest_tokens
from optkit.engine.sampler.scoring import score

__all__ = ["Sampled", "Sampler", "finite_rows", "likeliest_tokens", "score"]
