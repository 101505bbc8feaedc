"""Measuring configurations beside each other: quality, speed, memory and size, by every installed metric.

`apply` measures what it makes with these, and `optkit bench`, `eval` and `compare` measure finished artifacts again. A
`Task` knows what that means for its kind of model; nothing else here asks what a model is.
"""

from optkit.measure.contests import baseline_of, check_same_task, contest, contestant
from optkit.measure.figures import (
    BASELINE,
    OPTIMIZED,
    Contestant,
    Figures,
    Progress,
    compressed_bytes,
    folder_bytes,
    footprints,
    metrics_of,
    quality,
    speed,
)
from optkit.measure.generation import prompts_of
from optkit.measure.task import AnyTask, Demand, Task
from optkit.measure.tasks import measurable, task_of

__all__ = [
    "BASELINE",
    "OPTIMIZED",
    "AnyTask",
    "Contestant",
    "Demand",
    "Figures",
    "Progress",
    "Task",
    "baseline_of",
    "check_same_task",
    "compressed_bytes",
    "contest",
    "contestant",
    "folder_bytes",
    "footprints",
    "measurable",
    "metrics_of",
    "prompts_of",
    "quality",
    "speed",
    "task_of",
]
