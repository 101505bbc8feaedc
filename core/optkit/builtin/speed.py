"""Metrics of speed and size. Times are those that MLPerf Inference and the serving engines define."""

from __future__ import annotations

import math

from optkit.metrics import (
    EncodingMetric,
    EncodingRun,
    Footprint,
    FootprintMetric,
    ImageRun,
    ImageRunMetric,
    Run,
    RunMetric,
)

__all__ = [
    "DecodeTokensPerSecond",
    "ImagesPerSecond",
    "Latency",
    "PeakMemory",
    "PrefillTokensPerSecond",
    "SequencesPerSecond",
    "Size",
    "TimePerOutputToken",
    "TimeToFirstToken",
]


class DecodeTokensPerSecond(RunMetric):
    """Output tokens per second after the first: `(n - 1) / (t_n - t_1)`. NaN for fewer than two tokens."""

    unit = "tok/s"
    better = "higher"

    def of(self, run: Run) -> float:
        return 1 / _seconds_per_token(run)


class PrefillTokensPerSecond(RunMetric):
    """Prompt tokens per second until the first output token: `prompt_tokens / t_1`."""

    unit = "tok/s"
    better = "higher"

    def of(self, run: Run) -> float:
        return run.prompt_tokens / run.token_seconds[0]


class TimeToFirstToken(RunMetric):
    """TTFT: milliseconds from the request to its first output token."""

    unit = "ms"
    better = "lower"

    def of(self, run: Run) -> float:
        return 1e3 * run.token_seconds[0]


class TimePerOutputToken(RunMetric):
    """TPOT: milliseconds per output token after the first, `(t_n - t_1) / (n - 1)`. NaN for fewer than two tokens.

    Source: MLPerf Inference rules, https://github.com/mlcommons/inference_policies
    """

    unit = "ms"
    better = "lower"

    def of(self, run: Run) -> float:
        return 1e3 * _seconds_per_token(run)


class Latency(RunMetric):
    """Seconds from the request to its last output token."""

    unit = "s"
    better = "lower"

    def of(self, run: Run) -> float:
        return run.token_seconds[-1]


class SequencesPerSecond(EncodingMetric):
    """Texts embedded per second, all of them handed over at once, of the lengths that they have."""

    unit = "seq/s"
    better = "higher"

    def of(self, run: EncodingRun) -> float:
        return run.sequences / run.seconds if run.seconds > 0 else math.nan


class ImagesPerSecond(ImageRunMetric):
    """Prepared images classified per second, all of them handed over at once. Preparing them does not count."""

    unit = "img/s"
    better = "higher"

    def of(self, run: ImageRun) -> float:
        return run.images / run.seconds if run.seconds > 0 else math.nan


class Size(FootprintMetric):
    """Bytes of the files that are read to run the model."""

    unit = "B"
    better = "lower"

    def of(self, footprint: Footprint) -> float:
        return float(footprint.disk_bytes)


class PeakMemory(FootprintMetric):
    """Highest resident memory, in bytes, of a fresh process that opens the model and answers one request."""

    unit = "B"
    better = "lower"

    def of(self, footprint: Footprint) -> float:
        return float(footprint.peak_memory_bytes)


def _seconds_per_token(run: Run) -> float:
    if len(run.token_seconds) < 2 or run.token_seconds[-1] <= run.token_seconds[0]:
        return math.nan
    return (run.token_seconds[-1] - run.token_seconds[0]) / (len(run.token_seconds) - 1)
