"""Speed and size, measured: arms that run by turns, ratios with intervals, and what may be said of them."""

from optkit.bench.arms import SessionArm, TransformersArm
from optkit.bench.comparison import Comparison, Withheld, compare, compare_footprints
from optkit.bench.explaining import ExplainedRow, Explanation, explain
from optkit.bench.interleave import Arm, Sample, Samples, Workload, measure
from optkit.bench.memory import peak_memory
from optkit.bench.opening import Files, Opening, open_arm, open_session, opening_of
from optkit.bench.statistics import Estimate, Verdict, median_ratio, verdict

__all__ = [
    "Arm",
    "Comparison",
    "Estimate",
    "ExplainedRow",
    "Explanation",
    "Files",
    "Opening",
    "Sample",
    "Samples",
    "SessionArm",
    "TransformersArm",
    "Verdict",
    "Withheld",
    "Workload",
    "compare",
    "compare_footprints",
    "explain",
    "measure",
    "median_ratio",
    "open_arm",
    "open_session",
    "opening_of",
    "peak_memory",
    "verdict",
]
