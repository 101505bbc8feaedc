"""One step as a transaction: what cannot be computed fails alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from optkit.backends import TokenSession
from optkit.steps import Row, StepPlan

__all__ = ["execute", "said"]

Floats = npt.NDArray[np.float32]


def execute(session: TokenSession, rows: tuple[Row, ...]) -> tuple[dict[int, Floats], dict[int, str]]:
    """Run a step; when it raises, run it again in halves, until only rows that raise alone are left out.

    Half a step also takes less memory, so a step that was too large for the machine comes through in parts.

    Args:
        session: where a step that raised can be run again.
        rows: at least one.

    Returns:
        Logits by sequence, `[positions, vocabulary]`, and by sequence what went wrong with the others.
    """
    try:
        logits = session.execute(StepPlan(rows)).logits
    except Exception as error:
        if len(rows) == 1:
            return {}, {rows[0].sequence: said(error)}
        half = len(rows) // 2
        results, errors = execute(session, rows[:half])
        more, worse = execute(session, rows[half:])
        return results | more, errors | worse
    return dict(zip((row.sequence for row in rows), logits, strict=True)), {}


def said(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
