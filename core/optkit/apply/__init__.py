"""From recipe to artifact: plan, steps through the cache, measurement, gates, publication."""

from optkit.apply.plan import Estimate, Plan, make_plan
from optkit.apply.run import Outcome, Progress, apply

__all__ = ["Estimate", "Outcome", "Plan", "Progress", "apply", "make_plan"]
