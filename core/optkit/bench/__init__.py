"""Speed and size, measured: arms that run by turns, ratios with intervals, and what may be said of them."""

from optkit.bench.arms import EngineArm, SessionArm, TransformersArm
from optkit.bench.comparison import Comparison, Withheld, compare, compare_footprints
from optkit.bench.encoding import SessionEncodingArm, TransformersEncodingArm
from optkit.bench.explaining import ExplainedRow, Explanation, explain
from optkit.bench.imaging import SessionImageArm, TransformersImageArm
from optkit.bench.interleave import (
    Arm,
    EncodingArm,
    EncodingWorkload,
    GenerationArm,
    ImageArm,
    ImageWorkload,
    PassArm,
    Sample,
    Samples,
    Workload,
    measure,
    measure_passes,
)
from optkit.bench.memory import peak_memory
from optkit.bench.opening import Opening, arm_of_model, arm_of_session, open_arm, opening_of
from optkit.bench.statistics import Estimate, Verdict, median_ratio, verdict

__all__ = [
    "Arm",
    "Comparison",
    "EncodingArm",
    "EncodingWorkload",
    "EngineArm",
    "Estimate",
    "ExplainedRow",
    "Explanation",
    "GenerationArm",
    "ImageArm",
    "ImageWorkload",
    "Opening",
    "PassArm",
    "Sample",
    "Samples",
    "SessionArm",
    "SessionEncodingArm",
    "SessionImageArm",
    "TransformersArm",
    "TransformersEncodingArm",
    "TransformersImageArm",
    "Verdict",
    "Withheld",
    "Workload",
    "arm_of_model",
    "arm_of_session",
    "compare",
    "compare_footprints",
    "explain",
    "measure",
    "measure_passes",
    "median_ratio",
    "open_arm",
    "opening_of",
    "peak_memory",
    "verdict",
]
